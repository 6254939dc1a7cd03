// What the binding files share.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

#include "common.h"
#include "draw.h"

namespace titok {

template <class T>
T* pointer(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// (number, address of a tensor or 0)
template <class T>
using Pair = std::pair<T, std::uintptr_t>;

template <class T>
Value<T> value(const Pair<T>& pair) {
  return {pair.first, pointer<const T>(pair.second)};
}

inline DType parse_dtype(const std::string& name) {
  if (name == "float32") return DType::float32;
  if (name == "float16") return DType::float16;
  if (name == "bfloat16") return DType::bfloat16;
  throw std::invalid_argument("dtype: '" + name + "' is not float32, float16 or bfloat16");
}

}  // namespace titok
