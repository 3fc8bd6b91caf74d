// The embedded demo model answers needle questions by greedy decoding: the prompts of configs/demo/questions, the text
// prefilled, questions and answers fed through decode. An answer counts where each of its tokens is the likeliest after
// the ones before it, which is to say where greedy decoding writes it.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <map>
#include <nlohmann/json.hpp>

#include "engine/core/json.h"
#include "engine/core/mapped_file.h"
#include "engine/engine.h"
#include "tests/engine/device.h"
#include "tests/source_dir.h"

namespace vesper {
namespace {

constexpr int kQuestionsARow = 4;

std::vector<std::int32_t> read_row(const MappedFile& file, int row, int row_tokens) {
  std::vector<std::int32_t> ids;
  for (int i = 0; i < row_tokens; ++i) {
    std::uint16_t id = 0;
    std::memcpy(&id, file.bytes().data() + std::size_t{2} * static_cast<std::size_t>(row * row_tokens + i), 2);
    ids.push_back(id);
  }
  return ids;
}

std::int32_t likeliest(Engine& engine, std::int32_t row, std::vector<float>& logits) {
  engine.read_logits({&row, 1}, logits);
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

// How many of the row's questions are answered right.
int right_answers(Engine& engine, const std::vector<std::int32_t>& ids, const std::vector<int>& positions) {
  CachedSequence sequence;
  EXPECT_TRUE(engine.reserve(sequence, static_cast<int>(ids.size())));
  std::vector<float> logits(static_cast<std::size_t>(engine.config().vocab));
  const int first = positions.front();
  std::int32_t last_row = 0;
  for (int at = 0; at < first;) {
    const int count = std::min(engine.memory().limits.prefill_chunk, first - at);
    engine.prefill(sequence, std::span(ids).subspan(static_cast<std::size_t>(at), static_cast<std::size_t>(count)));
    last_row = count - 1;
    at += count;
  }
  std::map<int, bool> right;  // answer position -> predicted
  right[first] = likeliest(engine, last_row, logits) == ids[static_cast<std::size_t>(first)];
  for (int at = first; at + 1 < static_cast<int>(ids.size()); ++at) {
    const std::array<CachedSequence*, 1> sequences = {&sequence};
    engine.decode(sequences, std::span(ids).subspan(static_cast<std::size_t>(at), 1));
    if (std::find(positions.begin(), positions.end(), at + 1) == positions.end()) continue;
    right[at + 1] = likeliest(engine, 0, logits) == ids[static_cast<std::size_t>(at) + 1];
  }
  engine.truncate(sequence, 0);
  const int answer_tokens = static_cast<int>(positions.size()) / kQuestionsARow;
  int answered = 0;
  for (int question = 0; question < kQuestionsARow; ++question) {
    bool all = true;
    for (int i = 0; i < answer_tokens; ++i) {
      all = all && right.at(positions[static_cast<std::size_t>(question * answer_tokens + i)]);
    }
    answered += static_cast<int>(all);
  }
  return answered;
}

void expect_answers(int length) {
  const std::string folder = source_dir() + "/configs/demo";
  const nlohmann::json index = read_json_file(folder + "/questions/index.json")[std::to_string(length)];
  const MappedFile file(folder + "/questions/ids_" + std::to_string(length) + ".u16");
  EngineOptions options;
  options.limits.device = kTestDevice;
  options.limits.max_context = length + 1;
  Engine engine(folder, options, {});
  std::map<std::string, int> answered;
  for (int row = 0; row < index["rows"].get<int>(); ++row) {
    const auto positions = index["answer_positions"][static_cast<std::size_t>(row)].get<std::vector<int>>();
    const std::vector<std::int32_t> ids = read_row(file, row, index["row_tokens"].get<int>());
    answered[index["kind"][static_cast<std::size_t>(row)].get<std::string>()] += right_answers(engine, ids, positions);
  }
  EXPECT_GE(answered["words"], 39) << "of 40 word questions at " << length << " tokens";
  EXPECT_GE(answered["numbers"], 39) << "of 40 number questions at " << length << " tokens";
  std::printf("%d tokens: %d of 40 words, %d of 40 numbers\n", length, answered["words"], answered["numbers"]);
}

using NeedleTest = DeviceTest;

TEST_F(NeedleTest, At4096Tokens) {
  expect_answers(4096);
}

TEST_F(NeedleTest, At16384Tokens) {
  if (kTestDevice == DeviceKind::kCpu) GTEST_SKIP() << "sixteen minutes on two cores; runs on a GPU";
  expect_answers(16384);
}

}  // namespace
}  // namespace vesper
