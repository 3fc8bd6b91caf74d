#include "engine/eval.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cassert>
#include <cmath>

#include "engine/core/error.h"
#include "engine/core/mapped_file.h"
#include "engine/statistics.h"

namespace vesper {
namespace {

// Natural log of the sum of exponentials. A probability that is no number would spoil every mean after it.
double log_sum_exp(std::span<const float> logits) {
  const auto largest = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
  double sum = 0.0;
  for (const float logit : logits) sum += std::exp(static_cast<double>(logit) - largest);
  const double result = largest + std::log(sum);
  if (!std::isfinite(result)) {
    fail({"reading the logits of a decode step", "a sum of exponentials that is no finite number", "finite logits",
          "check the weights for NaN and infinities"});
  }
  return result;
}

// KL(p || q) of the distributions behind two rows of logits. Rounding may leave a sum just under 0.
double kl_divergence(std::span<const float> p, double p_lse, std::span<const float> q, double q_lse) {
  double sum = 0.0;
  for (std::size_t i = 0; i < p.size(); ++i) {
    const double log_p = static_cast<double>(p[i]) - p_lse;
    const double probability = std::exp(log_p);
    if (probability > 0.0) sum += probability * (log_p - (static_cast<double>(q[i]) - q_lse));
  }
  return std::max(0.0, sum);
}

// Visits the logits of the last `last` positions of every window, and the id that follows each.
//   visit(window, position, logits, target)
using Visit = std::function<void(std::size_t window, int position, std::span<const float> logits, std::int32_t target)>;

void visit_windows(Engine& engine, std::span<const TokenIds> windows, int last, const Progress& progress,
                   const Visit& visit) {
  std::int64_t total = 0;
  for (const TokenIds& window : windows) total += static_cast<std::int64_t>(window.size()) - 1;
  std::int64_t done = 0;
  for (std::size_t w = 0; w < windows.size(); ++w) {
    const std::span<const std::int32_t> ids(windows[w]);
    check_token_ids(engine.config(), ids, "reading a window's ids");
    feed_through_decode(
        engine, static_cast<int>(w), ids.first(ids.size() - 1), last,
        [&](int position, std::span<const float> logits) {
          visit(w, position, logits, ids[static_cast<std::size_t>(position) + 1]);
        },
        [&](int tokens) {
          done += tokens;
          if (progress) progress(done, total);
        });
  }
}

}  // namespace

TokenIds read_u16_ids(const std::string& path) {
  const MappedFile file(path);
  const std::span<const std::byte> bytes = file.bytes();
  if (bytes.size() % 2 != 0) {
    refuse({"reading token ids from " + path, fmt::format("{} bytes", bytes.size()), "16-bit numbers, an even count",
            "check that the file is whole"});
  }
  TokenIds ids(bytes.size() / 2);
  for (std::size_t i = 0; i < ids.size(); ++i) {
    ids[i] = std::to_integer<std::int32_t>(bytes[2 * i]) | std::to_integer<std::int32_t>(bytes[2 * i + 1]) << 8;
  }
  return ids;
}

std::vector<TokenIds> cut_windows(const TokenIds& ids, const WindowCut& cut, const std::string& source) {
  const bool bos = cut.bos_id >= 0;
  const std::int64_t taken = std::int64_t{cut.context} + (bos ? 0 : 1);
  const auto held = static_cast<std::int64_t>(ids.size());
  std::vector<std::int64_t> offsets = cut.offsets;
  for (int w = 0; cut.offsets.empty() && w < cut.windows; ++w) offsets.push_back(w * taken);
  std::vector<TokenIds> windows;
  for (const std::int64_t offset : offsets) {
    if (offset < 0 || offset > held - taken) {
      refuse({fmt::format("cutting windows of {} tokens from {}", cut.context, source),
              fmt::format("a window at token {}, of {} in all", offset, held),
              fmt::format("{} tokens from there on", taken),
              "take a longer text, fewer windows or a smaller --context"});
    }
    TokenIds window;
    if (bos) window.push_back(cut.bos_id);
    window.insert(window.end(), ids.begin() + offset, ids.begin() + offset + taken);
    windows.push_back(std::move(window));
  }
  return windows;
}

void prefill_in_chunks(Engine& engine, CachedSequence& sequence, std::span<const std::int32_t> ids,
                       const std::function<void(int tokens)>& on_step) {
  const auto chunk = static_cast<std::size_t>(engine.memory().limits.prefill_chunk);
  sequence.prompt_length = sequence.length + static_cast<int>(ids.size());
  for (std::size_t at = 0; at < ids.size();) {
    const std::size_t count = std::min(chunk, ids.size() - at);
    engine.prefill(sequence, ids.subspan(at, count));
    at += count;
    if (on_step) on_step(static_cast<int>(count));
  }
}

void feed_through_decode(Engine& engine, int request, std::span<const std::int32_t> ids, int decoded,
                         const std::function<void(int position, std::span<const float> logits)>& on_logits,
                         const std::function<void(int tokens)>& on_step) {
  assert(decoded >= 0 && decoded <= static_cast<int>(ids.size()));
  const int max_context = engine.memory().limits.max_context;
  CachedSequence sequence;
  sequence.request = request;
  if (static_cast<int>(ids.size()) > max_context || !engine.reserve(sequence, static_cast<int>(ids.size()))) {
    refuse({"feeding a window", fmt::format("{} tokens", ids.size()),
            fmt::format("at most {} (--max-context)", max_context), "raise --max-context or lower --context"});
  }
  const std::size_t prefilled = ids.size() - static_cast<std::size_t>(decoded);
  prefill_in_chunks(engine, sequence, ids.first(prefilled), on_step);
  std::vector<float> logits(static_cast<std::size_t>(engine.config().vocab));
  const std::array<CachedSequence*, 1> sequences = {&sequence};
  const std::int32_t row = 0;
  for (std::size_t at = prefilled; at < ids.size(); ++at) {
    engine.decode(sequences, ids.subspan(at, 1));
    engine.read_logits({&row, 1}, logits);
    on_logits(static_cast<int>(at), logits);
    if (on_step) on_step(1);
  }
  engine.truncate(sequence, 0);
}

std::int32_t likeliest(std::span<const float> logits) {
  return static_cast<std::int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

double Perplexity::nll() const {
  return mean(window_nll);
}

double Perplexity::perplexity() const {
  return std::exp(nll());
}

Perplexity eval_perplexity(Engine& engine, std::span<const TokenIds> windows, int last, const Progress& progress) {
  Perplexity result{.window_nll = std::vector<double>(windows.size(), 0.0)};
  visit_windows(engine, windows, last, progress,
                [&](std::size_t w, int /*position*/, std::span<const float> logits, std::int32_t target) {
                  const auto logit = static_cast<double>(logits[static_cast<std::size_t>(target)]);
                  result.window_nll[w] += (log_sum_exp(logits) - logit) / last;
                });
  return result;
}

std::vector<float> decode_logits(Engine& engine, std::span<const TokenIds> windows, int last,
                                 const Progress& progress) {
  std::vector<float> all;
  all.reserve(windows.size() * static_cast<std::size_t>(last) * static_cast<std::size_t>(engine.config().vocab));
  visit_windows(engine, windows, last, progress,
                [&](std::size_t /*w*/, int /*position*/, std::span<const float> logits, std::int32_t /*target*/) {
                  all.insert(all.end(), logits.begin(), logits.end());
                });
  return all;
}

Fidelity eval_fidelity(Engine& engine, std::span<const TokenIds> windows, int last, std::span<const float> reference,
                       const Progress& progress) {
  const auto vocab = static_cast<std::size_t>(engine.config().vocab);
  const std::size_t positions = windows.size() * static_cast<std::size_t>(last);
  assert(reference.size() == positions * vocab);
  Fidelity result;
  result.reference.window_nll.assign(windows.size(), 0.0);
  result.engine.window_nll.assign(windows.size(), 0.0);
  std::vector<double> divergences;
  int agreed = 0;
  AttentionFidelity attention(engine);
  const ProbeScope probe(engine, [&](const Exec& exec, const AttendedLayer& layer) { attention.look(exec, layer); });
  visit_windows(engine, windows, last, progress,
                [&](std::size_t w, int /*position*/, std::span<const float> logits, std::int32_t target) {
                  const std::span<const float> expected = reference.subspan(divergences.size() * vocab, vocab);
                  const double expected_lse = log_sum_exp(expected);
                  const double lse = log_sum_exp(logits);
                  const auto id = static_cast<std::size_t>(target);
                  result.reference.window_nll[w] += (expected_lse - static_cast<double>(expected[id])) / last;
                  result.engine.window_nll[w] += (lse - static_cast<double>(logits[id])) / last;
                  agreed += static_cast<int>(likeliest(expected) == likeliest(logits));
                  divergences.push_back(kl_divergence(expected, expected_lse, logits, lse));
                });
  result.kl_mean = mean(divergences);
  result.kl_p99 = quantile(divergences, 0.99);
  result.kl_max = quantile(divergences, 1.0);
  result.top1_agreement = static_cast<double>(agreed) / static_cast<double>(positions);
  result.layers = attention.layers();
  return result;
}

}  // namespace vesper
