#include "engine/needle_prompts.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <set>

#include "engine/core/error.h"
#include "engine/core/philox.h"

namespace vesper {
namespace {

constexpr std::string_view kHead =
    "Some special magic values are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the values afterwards.";
// Lines of the demo model's text start with a space: it was tokenised line by line.
constexpr std::string_view kNewLine = "\n ";
constexpr int kNeedlesAText = kQuestionsARow;
constexpr int kValueWords = 4;
constexpr int kValueDigits = 7;
// Keys of two words and values of four for each needle of a text, all different, with room to choose.
constexpr std::size_t kLeastCommon = 64;

bool is_lower(char letter) {
  return letter >= 'a' && letter <= 'z';
}

// Draws of one prompt: a stream of Philox words.
class Draws {
 public:
  Draws(std::uint32_t seed, std::uint32_t prompt) : seed_(seed), prompt_(prompt) {}

  // Uniform in [0, count).
  std::size_t below(std::size_t count) {
    const std::uint64_t word = philox({{next_++, prompt_, 0, 0}}, {{seed_, 0}}).word[0];
    return static_cast<std::size_t>(word * count >> 32);
  }

 private:
  std::uint32_t seed_;
  std::uint32_t prompt_;
  std::uint32_t next_ = 0;
};

NeedleQuestion make_question(NeedleKind kind, std::string key, std::string value) {
  const std::string_view ask = kind == NeedleKind::kWords ? "What are the special magic words for {0} mentioned in the "
                                                            "provided text? The special magic words for {0} mentioned "
                                                            "in the provided text is:"
                                                          : "What is the special magic number for {0} mentioned in the "
                                                            "provided text? The special magic number for {0} mentioned "
                                                            "in the provided text is:";
  NeedleQuestion question;
  question.text = std::string(kNewLine) + fmt::format(fmt::runtime(ask), key);
  question.key = std::move(key);
  question.value = std::move(value);
  return question;
}

std::string needle_line(NeedleKind kind, const NeedleQuestion& question) {
  return fmt::format("One of the special magic {} for {} is: {}.", needle_kind_name(kind), question.key,
                     question.value);
}

// Four questions whose words occur once among all of them, so that no needle can stand for another.
std::vector<NeedleQuestion> draw_questions(Draws& draws, const Haystack& haystack, NeedleKind kind) {
  std::set<std::size_t> taken;
  const auto draw_words = [&](std::size_t count) {
    std::string words;
    while (count > 0) {
      const std::size_t word = draws.below(haystack.common.size());
      if (!taken.insert(word).second) continue;
      words += (words.empty() ? "" : " ") + haystack.common[word];
      --count;
    }
    return words;
  };
  std::vector<NeedleQuestion> questions;
  for (int i = 0; i < kNeedlesAText; ++i) {
    std::string key = draw_words(1 + draws.below(2));
    std::string value;
    if (kind == NeedleKind::kWords) {
      value = draw_words(kValueWords);
    } else {
      for (int digit = 0; digit < kValueDigits; ++digit) value += static_cast<char>('0' + draws.below(10));
    }
    questions.push_back(make_question(kind, std::move(key), std::move(value)));
  }
  return questions;
}

// The prompt's text with `count` words from `first` on; needle i stands after a share depth of them.
std::string build_text(const Haystack& haystack, std::size_t first, std::size_t count, NeedleKind kind,
                       const std::vector<NeedleQuestion>& questions) {
  std::string text(kHead);
  bool new_line = true;
  for (std::size_t w = 0; w <= count; ++w) {
    for (const NeedleQuestion& question : questions) {
      if (static_cast<std::size_t>(question.depth * static_cast<double>(count)) != w) continue;
      text += std::string(kNewLine) + needle_line(kind, question);
      new_line = true;
    }
    if (w == count) break;
    const Haystack::Word& word = haystack.words[first + w];
    if (new_line || word.starts_line) {
      text += kNewLine;
    } else {
      text += ' ';
    }
    text += word.text;
    new_line = false;
  }
  return text;
}

// Tokens that greedy decoding of the value and the stop after it takes.
std::size_t answer_tokens(const Tokenizer& tokenizer, const NeedleQuestion& question) {
  return tokenizer.encode(question.value + ".").size() + 1;
}

NeedlePrompt make_prompt(const Tokenizer& tokenizer, const Haystack& haystack, const NeedlePromptOptions& options,
                         std::uint32_t number) {
  Draws draws(options.seed, number);
  NeedlePrompt prompt;
  prompt.kind = kNeedleKinds[number % kNeedleKinds.size()];
  prompt.questions = draw_questions(draws, haystack, prompt.kind);
  std::size_t tail = 0;  // the longest question with its answer
  for (NeedleQuestion& question : prompt.questions) {
    question.depth = static_cast<double>(draws.below(1 << 20)) / (1 << 20);
    tail = std::max(tail, tokenizer.encode(question.text).size() + answer_tokens(tokenizer, question));
  }

  // A word is a token or more, so context words are always enough.
  const auto context = static_cast<std::size_t>(options.context);
  const std::size_t words = haystack.words.size();
  const std::size_t first = words > context ? draws.below(words - context + 1) : 0;
  const auto fits = [&](std::size_t count) {
    const std::string text = build_text(haystack, first, count, prompt.kind, prompt.questions);
    return tokenizer.encode_prompt(text).size() + tail <= context;
  };
  std::size_t fitting = 0;
  std::size_t too_many = std::min(words - first, context) + 1;
  if (!fits(0)) {
    refuse({"hiding needles in a text", fmt::format("--context {}", options.context),
            "room for the introduction, four needles and a question", "raise --context"});
  }
  while (too_many - fitting > 1) {
    const std::size_t middle = fitting + (too_many - fitting) / 2;
    (fits(middle) ? fitting : too_many) = middle;
  }
  if (words <= context && fitting == words) {
    refuse({"hiding needles in a text", fmt::format("{} words", words),
            fmt::format("more than {} tokens hold", options.context), "take a longer text or a smaller --context"});
  }
  prompt.text = build_text(haystack, first, fitting, prompt.kind, prompt.questions);
  return prompt;
}

bool begins_with_value(const std::string& answer, const std::string& value) {
  const std::size_t start = answer.find_first_not_of(' ');
  if (start == std::string::npos || answer.compare(start, value.size(), value) != 0) return false;
  const std::size_t end = start + value.size();
  return end == answer.size() || std::isalnum(static_cast<unsigned char>(answer[end])) == 0;
}

// The first ids on which all of `prompts` agree with `text`. A tokenizer may join the text's end and a question's
// beginning, so the text alone does not tell.
std::size_t shared_ids(const TokenIds& text, const std::vector<TokenIds>& prompts) {
  std::size_t shared = text.size();
  for (const TokenIds& prompt : prompts) {
    const auto end = text.begin() + static_cast<std::ptrdiff_t>(shared);
    shared =
        static_cast<std::size_t>(std::mismatch(text.begin(), end, prompt.begin(), prompt.end()).first - text.begin());
  }
  return shared;
}

// Feeds the rest of the prompt through decode and goes on greedily.
std::string answer_greedily(Engine& engine, const Tokenizer& tokenizer, CachedSequence& sequence,
                            std::span<const std::int32_t> question, std::size_t tokens) {
  const std::array<CachedSequence*, 1> sequences = {&sequence};
  const std::int32_t row = 0;
  std::vector<float> logits(static_cast<std::size_t>(engine.config().vocab));
  for (std::size_t i = 0; i < question.size(); ++i) engine.decode(sequences, question.subspan(i, 1));
  StreamingDecoder decoder(tokenizer, true);
  std::string answer;
  for (std::size_t i = 0; i < tokens; ++i) {
    engine.read_logits({&row, 1}, logits);
    const std::int32_t id = likeliest(logits);
    answer += decoder.push(id);
    if (i + 1 < tokens) engine.decode(sequences, {&id, 1});
  }
  return answer + decoder.finish();
}

}  // namespace

Haystack make_haystack(const Tokenizer& tokenizer, const std::string& text, const std::string& source) {
  Haystack haystack;
  std::set<std::string> candidates;
  for (std::size_t at = 0; at < text.size();) {
    const std::size_t begin = text.find_first_not_of(" \t\r\n\f\v", at);
    if (begin == std::string::npos) break;
    const std::size_t end = std::min(text.find_first_of(" \t\r\n\f\v", begin), text.size());
    const bool starts_line = std::count(text.begin() + static_cast<std::ptrdiff_t>(at),
                                        text.begin() + static_cast<std::ptrdiff_t>(begin), '\n') > 0;
    const std::string word = text.substr(begin, end - begin);
    if (word.size() >= 4 && std::all_of(word.begin(), word.end(), is_lower)) candidates.insert(word);
    haystack.words.push_back({.text = word, .starts_line = starts_line});
    at = end;
  }
  // Behind another word, as it will stand: alone, some tokenizers leave the space in front of it out.
  const std::size_t alone = tokenizer.encode("is").size();
  for (const std::string& word : candidates) {
    if (tokenizer.encode("is " + word).size() == alone + 1) haystack.common.push_back(word);
  }
  if (haystack.common.size() < kLeastCommon) {
    refuse({"choosing keys and values from " + source,
            fmt::format("{} lower-case words of one token and at least four letters", haystack.common.size()),
            fmt::format("{} or more", kLeastCommon), "take a longer text"});
  }
  return haystack;
}

std::vector<NeedlePrompt> make_needle_prompts(const Tokenizer& tokenizer, const Haystack& haystack,
                                              const NeedlePromptOptions& options) {
  std::vector<NeedlePrompt> prompts;
  for (int left = options.questions; left > 0; left -= kNeedlesAText) {
    prompts.push_back(make_prompt(tokenizer, haystack, options, static_cast<std::uint32_t>(prompts.size())));
    prompts.back().questions.resize(static_cast<std::size_t>(std::min(left, kNeedlesAText)));
  }
  return prompts;
}

NeedleAnswers eval_needle_prompts(Engine& engine, const Tokenizer& tokenizer, std::span<const NeedlePrompt> prompts,
                                  const Progress& progress) {
  NeedleAnswers result;
  std::int64_t done = 0;
  for (std::size_t p = 0; p < prompts.size(); ++p) {
    const NeedlePrompt& prompt = prompts[p];
    std::vector<TokenIds> asked;
    std::size_t longest = 0;
    for (const NeedleQuestion& question : prompt.questions) {
      asked.push_back(tokenizer.encode_prompt(prompt.text + question.text));
      longest = std::max(longest, asked.back().size() + answer_tokens(tokenizer, question));
    }
    CachedSequence sequence;
    sequence.request = static_cast<std::int32_t>(p);
    const auto reserve = [&] {
      const auto tokens = static_cast<int>(longest);
      const int max_context = engine.memory().limits.max_context;
      if (tokens <= max_context && engine.reserve(sequence, tokens)) return;
      refuse({"asking a needle question", fmt::format("{} tokens", tokens),
              fmt::format("at most {} (--max-context)", max_context), "raise --max-context or lower --context"});
    };
    reserve();
    // Whole pages, so that no page's side tables remember the question before.
    std::size_t shared = shared_ids(tokenizer.encode_prompt(prompt.text), asked);
    shared -= shared % static_cast<std::size_t>(engine.memory().limits.page_tokens);
    // Texts are about equally long.
    const auto total = static_cast<std::int64_t>(shared * prompts.size());
    prefill_in_chunks(engine, sequence, std::span(asked.front()).first(shared), [&](int fed) {
      done += fed;
      if (progress) progress(std::min(done, total), total);
    });
    for (std::size_t q = 0; q < asked.size(); ++q) {
      const NeedleQuestion& question = prompt.questions[q];
      engine.truncate(sequence, static_cast<int>(shared));
      reserve();  // again: truncate gave pages back
      NeedleAnswer answer;
      answer.kind = prompt.kind;
      answer.question = question;
      answer.answer = answer_greedily(engine, tokenizer, sequence, std::span(asked[q]).subspan(shared),
                                      answer_tokens(tokenizer, question));
      answer.right = begins_with_value(answer.answer, question.value);
      NeedleCount& count = result.score[prompt.kind];
      count.right += static_cast<int>(answer.right);
      ++count.total;
      result.answers.push_back(std::move(answer));
    }
    engine.truncate(sequence, 0);
  }
  return result;
}

}  // namespace vesper
