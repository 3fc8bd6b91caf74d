#include "tokenizer/chat_text.h"

#include <algorithm>
#include <cassert>
#include <utility>

namespace vesper {
namespace {

// The first range that ends behind `at`.
auto first_behind(const std::vector<TextRange>& ranges, std::size_t at) {
  return std::upper_bound(ranges.begin(), ranges.end(), at,
                          [](std::size_t byte, const TextRange& range) { return byte < range.end; });
}

}  // namespace

ChatText ChatText::of_template(std::string_view bytes) {
  ChatText text;
  text.bytes_ = bytes;
  return text;
}

ChatText ChatText::of_message(std::string_view bytes) {
  ChatText text = of_template(bytes);
  if (!bytes.empty()) text.ranges_.push_back({0, bytes.size()});
  return text;
}

bool ChatText::is_of_template(std::size_t begin, std::size_t end) const {
  const auto range = first_behind(ranges_, begin);
  return begin >= end || range == ranges_.end() || range->begin >= end;
}

ChatText ChatText::part(std::size_t begin, std::size_t end) const {
  assert(begin <= end && end <= bytes_.size());
  ChatText text = of_template(std::string_view(bytes_).substr(begin, end - begin));
  for (auto range = first_behind(ranges_, begin); range != ranges_.end() && range->begin < end; ++range) {
    text.ranges_.push_back({std::max(range->begin, begin) - begin, std::min(range->end, end) - begin});
  }
  return text;
}

void ChatText::append(const ChatText& text) {
  const std::size_t offset = bytes_.size();
  bytes_ += text.bytes_;
  for (const TextRange& range : text.ranges_) {
    const TextRange moved{range.begin + offset, range.end + offset};
    if (!ranges_.empty() && ranges_.back().end == moved.begin) {
      ranges_.back().end = moved.end;
    } else {
      ranges_.push_back(moved);
    }
  }
}

ChatText ChatText::with_bytes(std::string bytes) const {
  assert(bytes.size() == bytes_.size());
  ChatText text = *this;
  text.bytes_ = std::move(bytes);
  return text;
}

}  // namespace vesper
