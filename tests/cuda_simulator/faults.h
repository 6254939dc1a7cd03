#pragma once

#include <string>
#include <vector>

std::vector<unsigned> run_fault(const std::string& name);
