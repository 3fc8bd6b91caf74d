#include "engine/stop_filter.h"

#include <algorithm>
#include <utility>

namespace vesper {

std::string StopFilter::push(std::string_view piece) {
  if (stopped_) return "";
  held_ += piece;
  std::size_t cut = std::string::npos;
  for (const std::string& stop : stops_) cut = std::min(cut, held_.find(stop));
  if (cut != std::string::npos) {
    stopped_ = true;
    held_.resize(cut);
    return std::exchange(held_, "");
  }
  // The longest tail that is a beginning of a stop string stays.
  std::size_t keep = 0;
  for (const std::string& stop : stops_) {
    for (std::size_t length = std::min(stop.size(), held_.size()); length > keep; --length) {
      if (held_.ends_with(std::string_view(stop).substr(0, length))) keep = length;
    }
  }
  std::string safe = held_.substr(0, held_.size() - keep);
  held_.erase(0, safe.size());
  return safe;
}

std::string StopFilter::finish() {
  return std::exchange(held_, "");
}

}  // namespace vesper
