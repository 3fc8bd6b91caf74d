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

// The same of several launches over the same turns, in turns with each other, A B A B: an entry a launch.
using QueueTurn = std::function<void(int turn)>;
std::vector<std::vector<double>> time_arms(const Exec& exec, int turns, const std::vector<QueueTurn>& queues);

// Turns over data of `bytes` each, of which a launch touches `touched`, so that what a round touches is more than four
// times the last cache: 256 at most (8 on the CPU), and as many as `room` holds; one where it is enough by itself, else
// two at least; 0 where these do not fit.
int turns_over(DeviceKind device, std::int64_t bytes, std::int64_t touched, std::int64_t room);

// Fails with a run error that names `what` and the worst element, unless |found - expected| <= bound everywhere; says
// how near the worst one comes.
std::string check_near(const std::string& what, const std::vector<float>& found, const std::vector<float>& expected,
                       const std::vector<float>& bound);

}  // namespace vesper
