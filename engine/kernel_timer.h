// Times of one kernel's launches over distinct data.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "engine/core/exec.h"

namespace vesper {

// `queue(turn)` queues the launch of one turn; it allocates nothing and waits for nothing. Seconds a launch, an entry a
// replay of all turns, on CUDA of as many rounds of them as make 24 launches.
std::vector<double> time_turns(const Exec& exec, int turns, const std::function<void(int turn)>& queue);

// Turns over data of `bytes` each, of which a launch touches `touched`, so that what a round touches is more than four
// times the last cache: two at least, 256 at most (8 on the CPU), and as many as `room` holds; 0 where not even two
// fit.
int turns_over(DeviceKind device, std::int64_t bytes, std::int64_t touched, std::int64_t room);

// Fails with a run error that names `what` and the worst element, unless |found - expected| <= bound everywhere; says
// how near the worst one comes.
std::string check_near(const std::string& what, const std::vector<float>& found, const std::vector<float>& expected,
                       const std::vector<float>& bound);

}  // namespace vesper
