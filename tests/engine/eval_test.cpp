// What vesper eval measures: on a tiny seeded model against direct computation, and the demo model's own questions.
#include "engine/eval.h"

#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>

#include "engine/core/error.h"
#include "engine/core/philox.h"
#include "engine/eval_needle.h"
#include "engine/needle_prompts.h"
#include "engine/statistics.h"
#include "tests/engine/device.h"
#include "tests/source_dir.h"

namespace vesper {
namespace {

constexpr const char* kTiny = "synthetic:tiny";
constexpr int kContext = 150;
constexpr int kLast = 40;

EngineOptions options_for(int max_context, std::uint64_t seed) {
  EngineOptions options;
  options.limits.device = kTestDevice;
  options.limits.max_context = max_context;
  options.limits.prefill_chunk = 64;
  options.seed = seed;
  return options;
}

TokenIds random_ids(int count, int vocab) {
  TokenIds ids;
  for (std::uint32_t i = 0; i < static_cast<std::uint32_t>(count); ++i) {
    ids.push_back(static_cast<std::int32_t>(philox({{i, 0, 0, 0}}, {{1, 0}}).word[0] % static_cast<unsigned>(vocab)));
  }
  return ids;
}

std::vector<TokenIds> two_windows() {
  const TokenIds ids = random_ids(2 * (kContext + 1), model_config_of(kTiny).vocab);
  return cut_windows(ids, {.context = kContext, .windows = 2, .offsets = {}, .bos_id = -1}, "random ids");
}

std::string refusal(const std::function<void()>& action) {
  try {
    action();
  } catch (const Error& error) {
    EXPECT_EQ(error.fault(), Fault::kInput);
    return error.what();
  }
  return "";
}

// A file in the temporary folder, gone with its owner.
class TemporaryFile {
 public:
  TemporaryFile(const std::string& name, const std::string& content)
      : path_((std::filesystem::temp_directory_path() / ("vesper_" + std::to_string(getpid()) + "_" + name)).string()) {
    std::ofstream(path_, std::ios::binary) << content;
  }
  ~TemporaryFile() { std::filesystem::remove(path_); }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  TemporaryFile(TemporaryFile&&) = delete;
  TemporaryFile& operator=(TemporaryFile&&) = delete;

  [[nodiscard]] const std::string& path() const { return path_; }

 private:
  std::string path_;
};

using EvalTest = DeviceTest;

TEST_F(EvalTest, WindowsAreCutWhereTheyAreAskedFor) {
  const TokenIds ids = {10, 11, 12, 13, 14, 15, 16};
  using Windows = std::vector<TokenIds>;
  const WindowCut plain{.context = 2, .windows = 2, .offsets = {}, .bos_id = -1};
  EXPECT_EQ(cut_windows(ids, plain, "ids"), (Windows{{10, 11, 12}, {13, 14, 15}}));
  const WindowCut bos{.context = 2, .windows = 2, .offsets = {}, .bos_id = 1};
  EXPECT_EQ(cut_windows(ids, bos, "ids"), (Windows{{1, 10, 11}, {1, 12, 13}}));
  const WindowCut placed{.context = 2, .windows = 1, .offsets = {4, 0}, .bos_id = -1};
  EXPECT_EQ(cut_windows(ids, placed, "ids"), (Windows{{14, 15, 16}, {10, 11, 12}}));
  const WindowCut past{.context = 2, .windows = 1, .offsets = {5}, .bos_id = -1};
  EXPECT_NE(refusal([&] { (void)cut_windows(ids, past, "ids"); }).find("a window at token 5, of 7 in all"),
            std::string::npos);
}

TEST_F(EvalTest, SixteenBitIdsAreLittleEndianAndWhole) {
  const TemporaryFile whole("whole.u16", std::string("\x01\x02\xff\x00\xfe\xff", 6));
  EXPECT_EQ(read_u16_ids(whole.path()), (TokenIds{0x0201, 255, 0xfffe}));
  const TemporaryFile half("half.u16", "abc");
  EXPECT_NE(refusal([&] { (void)read_u16_ids(half.path()); }).find("3 bytes"), std::string::npos);
}

TEST_F(EvalTest, QuantileIsTheNearestRank) {
  const std::vector<double> values = {5, 1, 4, 2, 3};
  EXPECT_EQ(quantile(values, 0.5), 3);
  EXPECT_EQ(quantile(values, 0.99), 5);
  EXPECT_EQ(quantile(values, 0.2), 1);
  EXPECT_EQ(quantile({}, 0.5), 0);
  EXPECT_EQ(mean(values), 3);
}

// The same likelihoods from logits that prefill made, whose sums run in another order.
TEST_F(EvalTest, PerplexityIsThatOfPrefillLogits) {
  Engine engine(kTiny, options_for(kContext, 5), {});
  const std::vector<TokenIds> windows = two_windows();
  const int pages = engine.free_pages();
  const Perplexity measured = eval_perplexity(engine, windows, kLast, {});
  EXPECT_EQ(engine.free_pages(), pages);

  double largest = 0.0;
  std::vector<double> expected;
  std::vector<float> logits(static_cast<std::size_t>(engine.config().vocab));
  for (const TokenIds& window : windows) {
    CachedSequence sequence;
    ASSERT_TRUE(engine.reserve(sequence, kContext));
    prefill_in_chunks(engine, sequence, std::span(window).first(kContext - kLast), {});
    engine.prefill(sequence, std::span(window).subspan(kContext - kLast, kLast));
    double sum = 0.0;
    for (std::int32_t row = 0; row < kLast; ++row) {
      engine.read_logits({&row, 1}, logits);
      double total = 0.0;
      for (const float logit : logits) {
        total += std::exp(static_cast<double>(logit));
        largest = std::max(largest, std::abs(static_cast<double>(logit)));
      }
      const auto target = static_cast<std::size_t>(window[static_cast<std::size_t>(kContext - kLast + row) + 1]);
      sum += std::log(total) - static_cast<double>(logits[target]);
    }
    expected.push_back(sum / kLast);
    engine.truncate(sequence, 0);
  }
  // Ten roundings a layer, at worst all in one direction, move a logit by this much; a likelihood by twice as much.
  const double unit = kTestDevice == DeviceKind::kCuda ? 0x1p-8 : 0x1p-23;
  const double allowed = 2.0 * 10.0 * engine.config().layers * unit * largest;
  for (std::size_t w = 0; w < windows.size(); ++w) {
    EXPECT_NEAR(measured.window_nll[w], expected[w], allowed) << "window " << w;
  }
  EXPECT_NEAR(measured.perplexity(), std::exp((measured.window_nll[0] + measured.window_nll[1]) / 2), 1e-9);
}

TEST_F(EvalTest, DenseIsFaithfulToDense) {
  Engine engine(kTiny, options_for(kContext, 5), {});
  const std::vector<TokenIds> windows = two_windows();
  const std::vector<float> logits = decode_logits(engine, windows, kLast, {});
  const Fidelity same = eval_fidelity(engine, windows, kLast, logits, {});
  EXPECT_EQ(same.kl_mean, 0.0);
  EXPECT_EQ(same.kl_max, 0.0);
  EXPECT_EQ(same.top1_agreement, 1.0);
  EXPECT_EQ(same.reference.window_nll, same.engine.window_nll);
  EXPECT_EQ(same.engine.window_nll, eval_perplexity(engine, windows, kLast, {}).window_nll);
}

TEST_F(EvalTest, AnotherModelIsNot) {
  const std::vector<TokenIds> windows = two_windows();
  Engine engine(kTiny, options_for(kContext, 5), {});
  Engine other(kTiny, options_for(kContext, 6), {});
  const std::vector<float> logits = decode_logits(other, windows, kLast, {});
  const Fidelity far = eval_fidelity(engine, windows, kLast, logits, {});
  // KL of the first position by hand, in the textbook's form: sum of p log(p / q).
  const auto vocab = static_cast<std::size_t>(engine.config().vocab);
  const auto softmax = [&](const std::vector<float>& all, std::size_t position) {
    std::vector<double> shares;
    double sum = 0.0;
    for (std::size_t i = 0; i < vocab; ++i) {
      shares.push_back(std::exp(static_cast<double>(all[position * vocab + i])));
      sum += shares.back();
    }
    for (double& share : shares) share /= sum;
    return shares;
  };
  const std::vector<float> own = decode_logits(engine, windows, kLast, {});
  double expected = 0.0;
  for (std::size_t position = 0; position < windows.size() * kLast; ++position) {
    const std::vector<double> p = softmax(logits, position);
    const std::vector<double> q = softmax(own, position);
    for (std::size_t i = 0; i < vocab; ++i) expected += p[i] * std::log(p[i] / q[i]);
  }
  expected /= static_cast<double>(windows.size() * kLast);
  EXPECT_GT(far.kl_mean, 0.0);
  EXPECT_NEAR(far.kl_mean, expected, 1e-9 * std::max(1.0, expected));
  EXPECT_GE(far.kl_max, far.kl_p99);
  EXPECT_GE(far.kl_p99, far.kl_mean);
  EXPECT_LT(far.top1_agreement, 0.5);
}

TEST_F(EvalTest, RefusesAWindowLongerThanTheContext) {
  Engine engine(kTiny, options_for(kContext - 1, 5), {});
  const std::string message = refusal([&] { (void)eval_perplexity(engine, two_windows(), kLast, {}); });
  EXPECT_NE(message.find("150 tokens"), std::string::npos) << message;
  EXPECT_NE(message.find("at most 149"), std::string::npos) << message;
}

const std::string& demo_folder() {
  static const std::string folder = source_dir() + "/configs/demo";
  return folder;
}

TEST_F(EvalTest, TheDemoModelAnswersTwoRows) {
  const std::string questions = demo_folder() + "/questions";
  std::vector<NeedleRow> rows = read_needle_rows(questions + "/ids_4096.u16", questions + "/index.json", 4096);
  ASSERT_EQ(rows.size(), 20U);
  rows.resize(2);
  Engine engine(demo_folder(), options_for(4096, 0), {});
  std::int64_t fed = 0;
  const NeedleScore score = eval_needle_rows(engine, rows, [&](std::int64_t done, std::int64_t total) {
    EXPECT_EQ(total, 2 * 4096);
    EXPECT_GT(done, fed);
    fed = done;
  });
  EXPECT_EQ(fed, 2 * 4096);
  for (const NeedleKind kind : kNeedleKinds) {
    EXPECT_EQ(score[kind].total, 4);
    EXPECT_GE(score[kind].right, 3) << needle_kind_name(kind);
  }
  // An answer with another last token is wrong, and spoils no other.
  rows.resize(1);
  std::int32_t& last = rows[0].ids[static_cast<std::size_t>(rows[0].answers.back())];
  const int right = eval_needle_rows(engine, rows, {})[rows[0].kind].right;
  last = last == 500 ? 501 : 500;
  EXPECT_EQ(eval_needle_rows(engine, rows, {})[rows[0].kind].right, std::min(right, 3));
}

TEST_F(EvalTest, RefusesQuestionsThatDoNotFitTheirIndex) {
  const std::string questions = demo_folder() + "/questions";
  const std::string index = questions + "/index.json";
  const auto message = [&](const std::string& ids, const std::string& index_path, int context) {
    return refusal([&] { (void)read_needle_rows(ids, index_path, context); });
  };
  EXPECT_NE(message(questions + "/ids_4096.u16", index, 512).find(R"(one of "16384", "4096")"), std::string::npos);
  EXPECT_NE(message(questions + "/ids_4096.u16", index, 16384).find("20 rows of 16385"), std::string::npos);
  const TemporaryFile ids("ids.u16", std::string(18, '\1'));
  const auto entry = [](const std::string& kind, const std::string& answers) {
    return R"({"8": {"rows": 1, "row_tokens": 9, "kind": [")" + kind + R"("], "answer_positions": [)" + answers + "]}}";
  };
  const TemporaryFile good("good.json", entry("words", "[2, 3, 4, 5]"));
  EXPECT_EQ(message(ids.path(), good.path(), 8), "");
  for (const char* answers : {"[2, 3, 4]", "[]", "[0, 1, 2, 3]", "[2, 3, 4, 9]", "[3, 2, 4, 5]", "[2, 2, 4, 5]", "7"}) {
    const TemporaryFile bad("bad.json", entry("words", answers));
    EXPECT_NE(message(ids.path(), bad.path(), 8).find("reading row 0"), std::string::npos) << answers;
  }
  const TemporaryFile kind("kind.json", entry("letters", "[2, 3, 4, 5]"));
  EXPECT_NE(message(ids.path(), kind.path(), 8).find("words or numbers"), std::string::npos);
  const TemporaryFile shape("shape.json", R"({"8": {"rows": -1}})");
  EXPECT_NE(message(ids.path(), shape.path(), 8).find("another shape"), std::string::npos);
}

TEST_F(EvalTest, PromptsHideWhatTheyAskForAndFillTheContext) {
  std::ifstream file(demo_folder() + "/needle-16k.txt");
  const std::string text(std::istreambuf_iterator<char>(file), {});
  const std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(demo_folder());
  const Haystack haystack = make_haystack(*tokenizer, text, "the text");
  const NeedlePromptOptions options{.context = 2048, .questions = 7, .seed = 3};
  const std::vector<NeedlePrompt> prompts = make_needle_prompts(*tokenizer, haystack, options);
  ASSERT_EQ(prompts.size(), 2U);
  EXPECT_EQ(prompts[0].questions.size() + prompts[1].questions.size(), 7U);
  EXPECT_NE(prompts[0].kind, prompts[1].kind);
  EXPECT_EQ(prompts[1].text, make_needle_prompts(*tokenizer, haystack, options)[1].text);
  for (const NeedlePrompt& prompt : prompts) {
    std::size_t longest = 0;
    for (const NeedleQuestion& question : prompt.questions) {
      const std::string needle = "\n One of the special magic " + std::string(needle_kind_name(prompt.kind)) + " for " +
                                 question.key + " is: " + question.value + ".";
      EXPECT_NE(prompt.text.find(needle), std::string::npos) << needle;
      const std::string whole = prompt.text + question.text + " " + question.value + ".";
      longest = std::max(longest, tokenizer->encode(whole).size() + 1);
    }
    EXPECT_LE(longest, 2048U);
    EXPECT_GE(longest, 2000U);
  }
  const NeedlePromptOptions longer{.context = 1 << 20, .questions = 1, .seed = 0};
  EXPECT_NE(refusal([&] { (void)make_needle_prompts(*tokenizer, haystack, longer); }).find("take a longer text"),
            std::string::npos);

  Engine engine(demo_folder(), options_for(2048, 0), {});
  const int pages = engine.free_pages();
  const NeedleAnswers answers = eval_needle_prompts(engine, *tokenizer, prompts, {});
  EXPECT_EQ(engine.free_pages(), pages);
  EXPECT_EQ(answers.score[NeedleKind::kWords].total + answers.score[NeedleKind::kNumbers].total, 7);
  for (const NeedleAnswer& answer : answers.answers) {
    EXPECT_EQ(answer.right, answer.answer.starts_with(" " + answer.question.value)) << answer.answer;
  }
  EXPECT_GE(answers.score[NeedleKind::kWords].right + answers.score[NeedleKind::kNumbers].right, 5);
}

}  // namespace
}  // namespace vesper
