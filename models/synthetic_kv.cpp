#include "models/synthetic_kv.h"

#include "engine/core/parallel.h"
#include "models/fill.h"

namespace vesper {

void draw_kv(const Exec& exec, const DrawnKv& drawn, int layer, const Batch& batch, std::int64_t head_dim,
             const TensorRef& qkv) {
  if constexpr (kHaveCuda) {
    if (exec.on_cuda()) return cuda::draw_kv(exec, drawn, layer, batch, head_dim, qkv);
  }
  cpu::draw_kv(drawn, layer, batch, head_dim, qkv.as<float, 2>());
}

void cpu::draw_kv(const DrawnKv& drawn, int layer, const Batch& batch, std::int64_t head_dim,
                  TensorView<float, 2> qkv) {
  constexpr int kGroup = 4;  // elements of one draw; head_dim is even, so k and v of all heads are whole groups
  const std::int64_t key_columns = drawn.key_range.shape(1) * head_dim;
  const std::int64_t first_column = qkv.shape(1) - 2 * key_columns;
  const auto draw = [&](std::uint64_t element, bool shared) {
    return uniform_values(element / kGroup, drawn.seed, drawn_tensor(layer, shared), 1.0F);
  };
  parallel_for(batch.tokens, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t t = begin; t < end; ++t) {
      const std::int32_t request = batch.request(batch.seq_of_token(t));
      const std::uint64_t token = drawn_element(request, batch.positions(t), 2 * key_columns);
      const std::uint64_t run = drawn_element(request, batch.positions(t) / kDrawnRun, 2 * key_columns);
      const std::uint64_t sequence = drawn_element(request, 0, 2 * key_columns);
      for (std::int64_t first = 0; first < 2 * key_columns; first += kGroup) {
        const UniformValues own = draw(token + static_cast<std::uint64_t>(first), false);
        const UniformValues of_keys = draw(run + static_cast<std::uint64_t>(first), true);
        const UniformValues of_values = draw(sequence + static_cast<std::uint64_t>(first), true);
        for (std::int64_t i = 0; i < kGroup; ++i) {
          const std::int64_t c = first + i;
          qkv(t, first_column + c) =
              c < key_columns ? drawn.key_range(layer, c / head_dim) *
                                    (drawn.run_share * of_keys.value[i] + drawn.token_share * own.value[i])
                              : kValueRange * (kValueShare * of_values.value[i] + kValueShare * own.value[i]);
        }
      }
    }
  });
}

}  // namespace vesper
