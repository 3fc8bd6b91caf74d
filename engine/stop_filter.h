// Cuts a stream of text at the first of several stop strings.
#pragma once

#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace vesper {

// Holds text back while it could still turn out to be the beginning of a stop string, so that nothing of a stop string
// is ever given out.
class StopFilter {
 public:
  StopFilter() = default;
  explicit StopFilter(std::vector<std::string> stops) : stops_(std::move(stops)) {}

  // Text that is safe to give out after `piece` has come. Once stopped, nothing more.
  std::string push(std::string_view piece);
  // What is still held back, at the end of the stream.
  std::string finish();
  [[nodiscard]] bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

}  // namespace vesper
