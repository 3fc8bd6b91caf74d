// From an element type known at run time to one known to the compiler, once, in a launcher.
#pragma once

#include <string>

#include "engine/core/dtype.h"
#include "engine/core/error.h"

namespace vesper {

// body(T{}) for the 16-bit floating type T that `dtype` names; throws a run error that names `doing` for any other.
template <typename Body>
void dispatch_16bit(DType dtype, const char* doing, const Body& body) {
  if (dtype == DType::kBf16) return body(bf16{});
  if (dtype == DType::kF16) return body(f16{});
  fail({doing, std::string("elements of type ") + std::string(dtype_name(dtype)), "bf16 or f16", ""});
}

// The same over all floating types.
template <typename Body>
void dispatch_float(DType dtype, const char* doing, const Body& body) {
  if (dtype == DType::kF32) return body(float{});
  if (dtype == DType::kBf16) return body(bf16{});
  if (dtype == DType::kF16) return body(f16{});
  fail({doing, std::string("elements of type ") + std::string(dtype_name(dtype)), "f32, bf16 or f16", ""});
}

}  // namespace vesper
