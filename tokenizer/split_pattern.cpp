#define PCRE2_CODE_UNIT_WIDTH 8
#include "tokenizer/split_pattern.h"

#include <pcre2.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <cstdint>
#include <utility>

#include "engine/core/error.h"
#include "engine/core/json.h"
#include "tokenizer/tokenizer.h"
#include "tokenizer/unicode_categories.h"
#include "tokenizer/utf8.h"

namespace vesper {
namespace {

// Ours; the longest published pattern has some 500 bytes.
constexpr std::size_t kMaxPatternBytes = 4096;
// White_Space, as the inside of a class: all of category Z, and six controls.
constexpr std::string_view kWhiteSpace = R"(\x{9}-\x{d}\x{85}\p{Z})";
// Unicode's general categories (UAX #44, table 12), without those of controls and of what is unassigned.
constexpr std::array<std::string_view, 31> kCategories = {
    "L",  "Lu", "Ll", "Lt", "Lm", "Lo", "M", "Mn", "Mc", "Me", "N",  "Nd", "Nl", "No", "P", "Pc",
    "Pd", "Ps", "Pe", "Pi", "Pf", "Po", "S", "Sm", "Sc", "Sk", "So", "Z",  "Zs", "Zl", "Zp"};

// Limits of one match, in PCRE2's steps. Nearly all matches take a few; those of long runs of white space take as many
// as the run has characters, so a match that needs more is tried again with more, out of a budget for the whole text.
// It keeps a hostile pattern to seconds for each MB of text.
constexpr std::uint32_t kFirstMatchLimit = 1000;
constexpr std::uint32_t kMatchLimitGrowth = 16;
constexpr std::uint64_t kBudgetSteps = 50'000'000;
constexpr std::uint64_t kBudgetStepsPerByte = 256;
constexpr std::uint32_t kHeapLimitKib = 256 * 1024;  // what the interpreter may take; the JIT has its own stack
constexpr std::size_t kJitStackBytes = 1U << 20;

// Turns a pattern into PCRE2's words, construct by construct.
class Translator {
 public:
  Translator(std::string_view pattern, const std::string& source)
      : rest_(pattern), pattern_(pattern), source_(source) {}

  std::string run() {
    while (!rest_.empty()) {
      const char c = rest_[0];
      if (c == '\\') {
        escape();
      } else if (in_class_) {
        class_character(c);
      } else if (c == '[') {
        open_class();
      } else if (c == '(') {
        group();
      } else if (c == '{') {
        repeat_count();
      } else if (c == '.' || c == '^' || c == '$') {
        unsupported(std::string(1, c));
      } else {
        copy(1);
      }
    }
    return std::move(out_);
  }

 private:
  [[noreturn]] void unsupported(const std::string& construct) const {
    refuse({"reading " + source_,
            "the construct " + in_quotes(construct) + " in the split pattern " + in_quotes(pattern_),
            "classes, \\p{category}, \\s, \\d, groups, (?i:, look-around and plain repetition",
            "this tokenizer is not supported"});
  }

  void copy(std::size_t bytes) {
    out_ += rest_.substr(0, bytes);
    rest_.remove_prefix(bytes);
  }
  void replace(std::size_t bytes, std::string_view text) {
    out_ += text;
    rest_.remove_prefix(bytes);
  }

  void escape() {
    const char c = rest_.size() > 1 ? rest_[1] : '\0';
    const std::string white(kWhiteSpace);
    if (c == 's') return replace(2, in_class_ ? white : "[" + white + "]");
    if (c == 'S' && !in_class_) return replace(2, "[^" + white + "]");
    if (c == 'd') return replace(2, members("Nd", /*negated=*/false));
    if (c == 'p' || c == 'P') return category(c == 'P');
    const bool control = c == 'r' || c == 'n' || c == 't' || c == 'f';
    if (!control && std::ispunct(static_cast<unsigned char>(c)) == 0) unsupported(std::string(rest_.substr(0, 2)));
    copy(2);
  }

  // The characters of a category, as a class or inside one.
  [[nodiscard]] std::string members(std::string_view name, bool negated) const {
    std::string inside = "\\p{" + std::string(name) + "}" + added_since_unicode14(name);
    if (in_class_) return inside;
    return (negated ? "[^" : "[") + inside + "]";
  }

  void category(bool negated) {
    const std::size_t end = rest_.find('}');
    if (rest_.size() < 4 || rest_[2] != '{' || end == std::string_view::npos || (negated && in_class_)) {
      unsupported(std::string(rest_.substr(0, 3)) + (in_class_ ? " inside [...]" : ""));
    }
    const std::string_view name = rest_.substr(3, end - 3);
    if (std::find(kCategories.begin(), kCategories.end(), name) == kCategories.end()) {
      unsupported(std::string(rest_.substr(0, end + 1)));
    }
    replace(end + 1, members(name, negated));
  }

  void open_class() {
    in_class_ = true;
    copy(rest_.starts_with("[^") ? 2 : 1);
    if (rest_.starts_with("]")) unsupported("[]");
  }

  void class_character(char c) {
    if (c == '[') unsupported("[ inside [...]");
    if (rest_.starts_with("&&")) unsupported("&&");
    if (c == ']') in_class_ = false;
    copy(1);
  }

  void group() {
    if (rest_.starts_with("(*")) unsupported("(*");
    if (!rest_.starts_with("(?")) return copy(1);
    for (const std::string_view known : {"(?i:", "(?:", "(?=", "(?!", "(?<=", "(?<!"}) {
      if (rest_.starts_with(known)) return copy(known.size());
    }
    unsupported(std::string(rest_.substr(0, 3)));
  }

  // "{n}", "{n,}" or "{n,m}". A "+" behind it would be possessive to PCRE2, and a repetition of the whole to Oniguruma.
  void repeat_count() {
    const std::size_t end = rest_.find('}');
    const std::string_view count = rest_.substr(1, end == std::string_view::npos ? 0 : end - 1);
    const bool plain = !count.empty() && std::isdigit(static_cast<unsigned char>(count[0])) != 0 &&
                       count.find_first_not_of("0123456789,") == std::string_view::npos;
    if (!plain || rest_.substr(end + 1).starts_with("+")) unsupported(std::string(rest_.substr(0, end + 2)));
    copy(end + 1);
  }

  std::string_view rest_;
  std::string_view pattern_;
  const std::string& source_;
  std::string out_;
  bool in_class_ = false;
};

struct Freer {
  void operator()(pcre2_code* code) const { pcre2_code_free(code); }
  void operator()(pcre2_match_data* data) const { pcre2_match_data_free(data); }
  void operator()(pcre2_match_context* context) const { pcre2_match_context_free(context); }
  void operator()(pcre2_jit_stack* stack) const { pcre2_jit_stack_free(stack); }
};
template <typename T>
using Owned = std::unique_ptr<T, Freer>;

std::string error_text(int error) {
  std::array<PCRE2_UCHAR, 256> text{};
  pcre2_get_error_message(error, text.data(), text.size());
  return reinterpret_cast<const char*>(text.data());
}

PCRE2_SPTR units(std::string_view text) {
  return reinterpret_cast<PCRE2_SPTR>(text.data());
}

// The search for matches, under limits.
class Search {
 public:
  explicit Search(const pcre2_code* code)
      : code_(code),
        data_(pcre2_match_data_create(1, nullptr)),
        context_(pcre2_match_context_create(nullptr)),
        jit_stack_(pcre2_jit_stack_create(std::size_t{32} << 10U, kJitStackBytes, nullptr)) {
    if (data_ == nullptr || context_ == nullptr || jit_stack_ == nullptr) {
      fail({"splitting a text into words", "no memory", "a few MB", ""});
    }
    pcre2_set_heap_limit(context_.get(), kHeapLimitKib);
    pcre2_jit_stack_assign(context_.get(), nullptr, jit_stack_.get());
  }

  // Allows the steps for another text.
  void begin(std::string_view text) { budget_ += kBudgetStepsPerByte * text.size(); }

  // The first match in `text` from `from` on; an empty range at the text's end where there is none.
  std::pair<std::size_t, std::size_t> next(std::string_view text, std::size_t from) {
    std::uint32_t limit = kFirstMatchLimit;
    while (true) {
      pcre2_set_match_limit(context_.get(), limit);
      const int result =
          pcre2_match(code_, units(text), text.size(), from, PCRE2_NO_UTF_CHECK, data_.get(), context_.get());
      if (result == PCRE2_ERROR_NOMATCH) return {text.size(), text.size()};
      if (result >= 0) {
        const PCRE2_SIZE* range = pcre2_get_ovector_pointer(data_.get());
        return {range[0], range[1]};
      }
      const std::uint64_t more = std::uint64_t{limit} * kMatchLimitGrowth;
      if (result != PCRE2_ERROR_MATCHLIMIT || more > budget_ || more > UINT32_MAX) {
        refuse({"splitting a text into words",
                "a split pattern that gives up at byte " + std::to_string(from) + " (" + error_text(result) + ")",
                "one that ends within the limits of a sane one", "check the tokenizer's split pattern"});
      }
      budget_ -= more;
      limit = static_cast<std::uint32_t>(more);
    }
  }

 private:
  const pcre2_code* code_;
  Owned<pcre2_match_data> data_;
  Owned<pcre2_match_context> context_;
  Owned<pcre2_jit_stack> jit_stack_;
  std::uint64_t budget_ = kBudgetSteps;
};

Owned<pcre2_code> compile(std::string_view pattern, std::uint32_t options, const std::string& source) {
  int error = 0;
  PCRE2_SIZE offset = 0;
  Owned<pcre2_code> code(pcre2_compile(units(pattern), pattern.size(), PCRE2_UTF | options, &error, &offset, nullptr));
  if (code == nullptr) {
    refuse({"reading " + source,
            "the split pattern " + in_quotes(pattern) + " (" + error_text(error) + " at byte " +
                std::to_string(offset) + ")",
            "a regular expression", "copy or download the file again"});
  }
  // Where the machine allows no JIT, the interpreter gives the same matches.
  (void)pcre2_jit_compile(code.get(), PCRE2_JIT_COMPLETE);
  return code;
}

void check_size(const std::string& pattern, const std::string& source) {
  if (!pattern.empty() && pattern.size() <= kMaxPatternBytes && find_invalid_utf8(pattern) < 0) return;
  refuse({"reading " + source, "a split pattern of " + std::to_string(pattern.size()) + " bytes",
          "1 to " + std::to_string(kMaxPatternBytes) + " bytes of UTF-8", ""});
}

}  // namespace

struct SplitPattern::Compiled {
  Owned<pcre2_code> code;
};

SplitPattern::SplitPattern() = default;
SplitPattern::~SplitPattern() = default;
SplitPattern::SplitPattern(SplitPattern&&) noexcept = default;
SplitPattern& SplitPattern::operator=(SplitPattern&&) noexcept = default;

SplitPattern::SplitPattern(const std::string& pattern, const std::string& source) {
  check_size(pattern, source);
  const std::string translated = Translator(pattern, source).run();
  compiled_ = std::make_unique<Compiled>(Compiled{compile(translated, PCRE2_UCP, source)});
}

SplitPattern SplitPattern::literal(const std::string& text, const std::string& source) {
  check_size(text, source);
  SplitPattern pattern;
  pattern.compiled_ = std::make_unique<Compiled>(Compiled{compile(text, PCRE2_LITERAL, source)});
  return pattern;
}

std::vector<std::string_view> SplitPattern::split(const std::vector<std::string_view>& texts) const {
  std::vector<std::string_view> words;
  Search search(compiled_->code.get());
  for (const std::string_view text : texts) {
    search.begin(text);
    std::size_t done = 0;
    for (std::size_t from = 0; from < text.size();) {
      const auto [begin, end] = search.next(text, from);
      if (begin > done) words.push_back(text.substr(done, begin - done));
      if (end > begin) words.push_back(text.substr(begin, end - begin));
      done = from = end;
      if (begin == end && end < text.size()) from += utf8_step(text, end).bytes;  // an empty match parts words too
    }
    if (done < text.size()) words.push_back(text.substr(done));
  }
  return words;
}

}  // namespace vesper
