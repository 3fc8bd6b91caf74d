#include "tokenizer/tokenizer.h"
#include "tokenizer/utf8.h"

namespace vesper {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

}  // namespace

StreamingDecoder::StreamingDecoder(const Tokenizer& tokenizer, bool continues)
    : tokenizer_(&tokenizer), at_start_(!continues) {}

std::string StreamingDecoder::push(std::int32_t id) {
  if (id >= tokenizer_->vocab()) return "";
  const std::string inside = tokenizer_->token_bytes(id);
  pending_ += at_start_ ? tokenizer_->first_token_bytes(id) : inside;
  if (!inside.empty()) at_start_ = false;  // a control token leaves the text at its start
  return take_whole_characters();
}

std::string StreamingDecoder::finish() {
  if (pending_.empty()) return "";
  pending_.clear();  // one unfinished character, hence one maximal subpart
  return std::string(kReplacement);
}

// One U+FFFD for each maximal subpart of an ill-formed sequence: the Unicode standard, section 3.9, "U+FFFD
// Substitution of Maximal Subparts".
std::string StreamingDecoder::take_whole_characters() {
  std::string text;
  std::size_t at = 0;
  while (at < pending_.size()) {
    const Utf8Step step = utf8_step(pending_, at);
    if (step.kind == Utf8Kind::kUnfinished) break;
    text += step.kind == Utf8Kind::kCharacter ? std::string_view(pending_).substr(at, step.bytes) : kReplacement;
    at += step.bytes;
  }
  pending_.erase(0, at);
  return text;
}

}  // namespace vesper
