// The best pages of each list on CUDA, from scores that lie in memory: the `chosen` pages of the largest score between
// sink and window, ties to the lower page, ascending.
//
// Shapes: scores [seqs, kv_heads, pages]; lists as in attention/selection.h.
// Mapping: grid (kv_heads, seqs), one block a list; within it see attention/select_list.cuh.
// Byte bound: each score once, 4 bytes a listed page. One block a list is bound by what one multiprocessor does, not by
// memory: attention/score_pages_cuda.cu hides it behind the scoring of other lists.
#include "attention/select_list.cuh"
#include "attention/select_pages.h"
#include "engine/core/launch.cuh"
#include "engine/core/overlap.cuh"

namespace vesper::cuda {
namespace {

struct Args {
  SelectArgs select;
  TensorView<const std::int32_t, 1> kv_len;
  std::int32_t dense_tokens = 0;
  int page_tokens = 0;
};

__global__ void __launch_bounds__(kSelectThreads, 2) select_best(const __grid_constant__ Args args) {
  __shared__ SelectShared shared;
  const int g = static_cast<int>(blockIdx.x);
  const int s = static_cast<int>(blockIdx.y);
  let_next_start();
  clear_bins(shared.search);
  wait_for_previous();
  __syncthreads();
  const int kv_len = args.kv_len(s);
  if (kv_len <= args.dense_tokens) return;
  select_list(shared, args.select, s, g, page_choice(args.select.budget, kv_len, args.page_tokens));
}

}  // namespace

void select_pages(const Exec& exec, const AttentionShape& shape, const Batch& batch, TensorView<const float, 3> scores,
                  const PageBudget& budget, DenseLimit dense, const Selection& pages) {
  if (batch.seqs == 0) return;
  Args args;
  args.select = {.scores = scores, .budget = budget, .pages = pages};
  args.kv_len = batch.kv_len;
  args.dense_tokens = dense.tokens;
  args.page_tokens = shape.page_tokens;
  launch("select_best", select_best,
         {.grid = dim3(static_cast<unsigned>(shape.kv_heads), static_cast<unsigned>(batch.seqs)),
          .block = dim3(kSelectThreads),
          .overlap = true},
         exec.stream, args);
}

}  // namespace vesper::cuda
