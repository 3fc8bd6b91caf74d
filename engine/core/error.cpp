#include "engine/core/error.h"

namespace vesper {
namespace {

std::string sentence(const ErrorParts& parts) {
  std::string text = parts.doing;
  if (!parts.found.empty()) text += ": found " + parts.found;
  if (!parts.expected.empty()) text += (parts.found.empty() ? ": expected " : ", expected ") + parts.expected;
  if (!parts.change.empty()) text += "; " + parts.change;
  return text;
}

}  // namespace

Error::Error(Fault fault, const ErrorParts& parts) : std::runtime_error(sentence(parts)), fault_(fault) {}

void refuse(const ErrorParts& parts) {
  throw Error(Fault::kInput, parts);
}

void fail(const ErrorParts& parts) {
  throw Error(Fault::kRun, parts);
}

}  // namespace vesper
