// What the binding files share.
#pragma once

#include <stdexcept>
#include <string>

#include "common.h"

namespace titok {

inline DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float16") return DType::float16;
  if (name == "bfloat16") return DType::bfloat16;
  throw std::invalid_argument("dtype: '" + name + "' is not float32, float16 or bfloat16");
}

}  // namespace titok
