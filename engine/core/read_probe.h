// The ruler for everything that is bound by memory: how fast this machine reads, measured on the machine itself.
#pragma once

#include <cstdint>

#include "engine/core/dtype.h"
#include "engine/core/exec.h"

namespace vesper {

struct ReadRate {
  double bytes_per_s = 0.0;  // median of the timed passes
  std::int64_t bytes = 0;    // of one pass
};

// Reads random data far larger than any cache (4 GiB on CUDA, 256 MiB on the CPU, never more than a quarter of the free
// memory), several times over, and gives the memory back. Every byte enters a checksum that is compared with the one
// made when the data was written, so that no pass can skip any: a run error otherwise. Waits.
ReadRate probe_read_rate(const Exec& exec);

// Words of random data as both devices write them: the finaliser of MurmurHash3 (Appleby), over the word's number.
VESPER_HD constexpr std::uint32_t probe_word(std::uint64_t number) {
  auto word = static_cast<std::uint32_t>(number ^ (number >> 32)) * 0x9E3779B9U + 1U;
  word = (word ^ (word >> 16)) * 0x85EBCA6BU;
  word = (word ^ (word >> 13)) * 0xC2B2AE35U;
  return word ^ (word >> 16);
}

namespace cuda {
// Queues: `words` words written, and their exclusive or joined to `checksum`.
void write_probe_data(const Exec& exec, std::uint32_t* data, std::int64_t words, std::uint32_t* checksum);
// Queues: the same words read, and their exclusive or joined to `checksum`. `words` is a multiple of 4.
void read_probe_data(const Exec& exec, const std::uint32_t* data, std::int64_t words, std::uint32_t* checksum);
}  // namespace cuda

}  // namespace vesper
