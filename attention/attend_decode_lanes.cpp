// Attention of one query token over a range of keys, a block of 64 keys after the other with a running maximum. The
// block's keys, then its values, come from memory once and serve all heads of the group, two at a time, from the first-
// level cache. Memory is kept busy throughout: scoring asks for the block's values, gathering for the next block's
// keys. A score is a sum over the eight lanes of models/linear.h, an output a sum over keys in order. Compiled twice;
// see engine/core/lanes.h.
#include "attention/attend_lanes.h"
#include "attention/key_rows.h"
#include "engine/core/lanes.h"

namespace vesper::cpu::VESPER_LANES {
namespace {

// The group's running state.
struct State {
  std::int64_t width = 0;    // head_dim in whole chunks
  float* q = nullptr;        // [group, width], padded with zeros
  float* out = nullptr;      // [group, width], not yet normalised
  float* scores = nullptr;   // [group, kBlockKeys], then weights
  float* largest = nullptr;  // [group]
  float* sum = nullptr;      // [group]
  float* rescale = nullptr;  // [group]

  explicit State(const DecodeSplit& split) : width(std::int64_t{8} * split.kv.chunks) {
    q = split.scratch;
    out = q + split.group * width;
    scores = out + split.group * width;
    largest = scores + std::int64_t{split.group} * kBlockKeys;
    sum = largest + split.group;
    rescale = sum + split.group;
  }
};

// Channels 8c ... 8c + 7 of a head in q or out.
VESPER_INLINE float* chunk_of(const State& state, float* heads, int h, int c) {
  return heads + h * state.width + std::int64_t{8} * c;
}
// A head's scores.
VESPER_INLINE float* scores_of(const State& state, int h) {
  return state.scores + std::int64_t{h} * kBlockKeys;
}

// Scores of kHeads heads, four keys at a time. The first pass over a block asks for its values.
template <int kHeads>
void score(const DecodeSplit& split, const State& state, const KeyRows& rows, int head) {
  const int whole = split.kv.head_dim / 8;
  for (int t = 0; t < rows.count; t += 4) {
    int key[4];  // past the end, the last key again; weigh() hides it
    for (int i = 0; i < 4; ++i) key[i] = t + i < rows.count ? t + i : rows.count - 1;
    if (head == 0) {
      for (const int i : key) prefetch_row(rows.v[i], rows.chunk[i], split.kv.chunks);
    }
    f32x8 sum[kHeads][4] = {};
    const auto add = [&](int c, int width) {
      f32x8 k[4];
      for (int i = 0; i < 4; ++i) k[i] = load_chunk(rows.k[key[i]], rows.chunk[key[i]], c, width);
      for (int h = 0; h < kHeads; ++h) {
        const f32x8 q = load(chunk_of(state, state.q, head + h, c));
        for (int i = 0; i < 4; ++i) sum[h][i] += q * k[i];
      }
    };
    for (int c = 0; c < whole; ++c) add(c, 8);
    if (whole < split.kv.chunks) add(whole, chunk_width(split.kv, whole));
    for (int h = 0; h < kHeads; ++h) {
      store(scores_of(state, head + h) + t, join(sum[h][0], sum[h][1], sum[h][2], sum[h][3]) * split.scale);
    }
  }
}

// The rows of the block that begins with key `first`.
void find_block(const DecodeSplit& split, int first, KeyRows& rows) {
  if (split.list.k != nullptr) {
    find_rows(split.list, first, split.key_end, rows);
  } else {
    find_rows(split.kv, first, split.key_end, rows);
  }
}

// Adds the tail's weight to the scores of its keys, where the block that begins with key `first` has some.
void add_tail_weight(const DecodeSplit& split, const State& state, int first, int keys) {
  const int begin = split.tail_begin > first ? split.tail_begin - first : 0;
  for (int h = 0; h < split.group; ++h) {
    for (int t = begin; t < keys; ++t) scores_of(state, h)[t] += split.tail_log_weight;
  }
}

// Scores of one head become weights.
void weigh(const State& state, int keys, int h) {
  float* scores = scores_of(state, h);
  for (int t = keys; t % 8 != 0; ++t) scores[t] = -__builtin_inff();
  f32x8 most = splat(state.largest[h]);
  for (int t = 0; t < keys; t += 8) most = larger(load(scores + t), most);
  const float largest = largest_lane(most);
  const float rescale = exponential(splat(state.largest[h] - largest))[0];
  f32x8 weights = {};
  for (int t = 0; t < keys; t += 8) {
    const f32x8 weight = exponential(load(scores + t) - largest);
    store(scores + t, weight);
    weights += weight;
  }
  state.largest[h] = largest;
  state.sum[h] = state.sum[h] * rescale + join(weights);
  state.rescale[h] = rescale;
}

// out = out * rescale + weights V for kHeads heads and kChunks chunks from c on. The first pass over a block asks for
// the keys of the next.
template <int kHeads, int kChunks>
VESPER_INLINE void gather(const DecodeSplit& split, const State& state, const KeyRows& rows, const KeyRows& next,
                          int head, int c, int width) {
  const int asked = head == 0 && c == 0 ? next.count : 0;
  f32x8 sum[kHeads][kChunks];
  for (int h = 0; h < kHeads; ++h) {
    for (int i = 0; i < kChunks; ++i) {
      sum[h][i] = load(chunk_of(state, state.out, head + h, c + i)) * state.rescale[head + h];
    }
  }
  for (int t = 0; t < rows.count; ++t) {
    if (t < asked) prefetch_row(next.k[t], next.chunk[t], split.kv.chunks);
    f32x8 v[kChunks];
    for (int i = 0; i < kChunks; ++i) v[i] = load_chunk(rows.v[t], rows.chunk[t], c + i, width);
    for (int h = 0; h < kHeads; ++h) {
      const f32x8 weight = splat(scores_of(state, head + h)[t]);
      for (int i = 0; i < kChunks; ++i) sum[h][i] += weight * v[i];
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int i = 0; i < kChunks; ++i) store(chunk_of(state, state.out, head + h, c + i), sum[h][i]);
  }
}

template <int kHeads>
void gather(const DecodeSplit& split, const State& state, const KeyRows& rows, const KeyRows& next, int head) {
  const int whole = split.kv.head_dim / 8;
  int c = 0;
  for (; c + 4 <= whole; c += 4) gather<kHeads, 4>(split, state, rows, next, head, c, 8);
  for (; c < split.kv.chunks; ++c) gather<kHeads, 1>(split, state, rows, next, head, c, chunk_width(split.kv, c));
}

}  // namespace

std::int64_t decode_scratch(int group, int head_dim) {
  const std::int64_t width = (std::int64_t{head_dim} + 7) / 8 * 8;
  return group * (2 * width + kBlockKeys + 3);  // as State takes it
}

void attend(const DecodeSplit& split) {
  const State state(split);
  const int head_dim = split.kv.head_dim;
  for (std::int64_t h = 0; h < split.group; ++h) {
    for (std::int64_t d = 0; d < state.width; ++d) {
      state.q[h * state.width + d] = d < head_dim ? split.q[h * head_dim + d] : 0.0F;
      state.out[h * state.width + d] = 0.0F;
    }
    state.largest[h] = -__builtin_inff();
    state.sum[h] = 0.0F;
  }

  KeyRows blocks[2];
  KeyRows* rows = &blocks[0];
  KeyRows* next = &blocks[1];
  find_block(split, split.key_begin, *rows);
  for (int first = split.key_begin; first < split.key_end; first += kBlockKeys) {
    find_block(split, first + kBlockKeys, *next);
    int h = 0;
    for (; h + 2 <= split.group; h += 2) score<2>(split, state, *rows, h);
    if (h < split.group) score<1>(split, state, *rows, h);
    add_tail_weight(split, state, first, rows->count);
    for (h = 0; h < split.group; ++h) weigh(state, rows->count, h);
    h = 0;
    for (; h + 2 <= split.group; h += 2) gather<2>(split, state, *rows, *next, h);
    if (h < split.group) gather<1>(split, state, *rows, *next, h);
    KeyRows* read = rows;
    rows = next;
    next = read;
  }

  for (int h = 0; h < split.group; ++h) {
    for (int d = 0; d < head_dim; ++d)
      split.out[h * split.out_stride + d] = state.out[h * state.width + d] / state.sum[h];
    split.lse[h * split.lse_stride] = state.largest[h] + __builtin_logf(state.sum[h]);
  }
}

}  // namespace vesper::cpu::VESPER_LANES
