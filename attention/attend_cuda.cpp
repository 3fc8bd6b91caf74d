// What the attention kernels take, said in one place.
#include <string>

#include "attention/attend.h"
#include "engine/core/error.h"

namespace vesper::cuda {

void check_attention_shape(const AttentionShape& shape) {
  if (shape.head_dim != 64 && shape.head_dim != 128) {
    refuse({"choosing the CUDA attention kernel", "head_dim " + std::to_string(shape.head_dim), "64 or 128",
            "--device cpu takes any head_dim"});
  }
  if (shape.kv_heads < 1 || shape.heads % shape.kv_heads != 0 || shape.group() < 1 || shape.group() > 16) {
    refuse({"choosing the CUDA attention kernel",
            std::to_string(shape.heads) + " query heads over " + std::to_string(shape.kv_heads) + " KV heads",
            "1 to 16 query heads for each KV head", "--device cpu takes any group"});
  }
  if (shape.page_tokens != 16 && shape.page_tokens != 32 && shape.page_tokens != 64) {
    refuse({"choosing the CUDA attention kernel", "page_tokens " + std::to_string(shape.page_tokens), "16, 32 or 64",
            "set --page-tokens to one of these"});
  }
}

}  // namespace vesper::cuda
