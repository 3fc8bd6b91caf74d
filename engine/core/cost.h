// What an operation cannot do without: the ruler that its measured time is divided by.
#pragma once

#include <cstdint>

namespace vesper {

// Each input read once, each output written once; a multiply-add is two flops.
struct Cost {
  std::int64_t bytes = 0;
  std::int64_t flops = 0;
};

// Of two operations in a row, where the second does not read what the first has read.
constexpr Cost operator+(const Cost& a, const Cost& b) {
  return {.bytes = a.bytes + b.bytes, .flops = a.flops + b.flops};
}

}  // namespace vesper
