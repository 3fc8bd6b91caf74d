// What every GPU test begins with.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "engine/core/stream.h"

// Skips the test, with the reason, on a machine without a usable GPU.
#define VESPER_NEEDS_GPU()                                             \
  do {                                                                 \
    const std::string reason = ::vesper::cuda_unavailable_reason();    \
    if (!reason.empty()) GTEST_SKIP() << "no CUDA device: " << reason; \
  } while (0)
