// The stages of a layer's attention in a decode step, told as they are queued to whoever times them.
#pragma once

#include <functional>
#include <span>
#include <string_view>

#include "engine/core/cost.h"
#include "engine/core/exec.h"

namespace vesper {

// What a stage cannot do without. How long lists are is known on the device alone, so it may read there and wait: it is
// called, if at all, after the stage's own work was queued and before that of the next.
using StageCost = std::function<Cost()>;

// Whose stage it is: a layer's own, or one of several layers at once, behind the last layer of the step.
struct StageOwner {
  int layer = 0;                      // of several: the first
  std::span<const int> sharers = {};  // all of several; empty where it is the layer's own
};

// Called where a stage begins; it ends where the owner's next one begins, or where `stage` is empty: then the layer's
// attention has ended, or the shared stage. Names are those of the work that is queued, joined by '+' where one launch
// does what elsewhere takes several ("score+select").
using StageMark =
    std::function<void(const Exec& exec, const StageOwner& owner, std::string_view stage, const StageCost& cost)>;

}  // namespace vesper
