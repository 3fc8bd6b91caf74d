// Views of tensors: `TensorView<T, Rank>` where type and rank are known to the compiler, `TensorRef` where the type
// comes from a file or a device. Neither owns memory; both are row-major and dense unless a row stride is given.
#pragma once

#include <array>
#include <cassert>
#include <concepts>
#include <cstdint>
#include <type_traits>

#include "engine/core/dtype.h"

namespace vesper {

// A view of a row-major array [shape(0), ..., shape(Rank - 1)]. Extents and strides count elements, never bytes.
// Passed by value to host functions and to kernels alike.
template <typename T, int Rank>
class TensorView {
 public:
  TensorView() = default;

  template <std::integral... Extents>
  VESPER_HD explicit TensorView(T* data, Extents... extents)
      : data_(data), shape_{static_cast<std::int64_t>(extents)...} {
    static_assert(sizeof...(Extents) == Rank, "one extent for each dimension");
  }

  // A view of T is also a view of const T.
  template <typename U, typename = std::enable_if_t<std::is_same_v<const U, T>>>
  // NOLINTNEXTLINE(google-explicit-constructor)
  VESPER_HD TensorView(const TensorView<U, Rank>& other) : data_(other.data()) {
    for (int d = 0; d < Rank; ++d) shape_[d] = other.shape(d);
  }

  VESPER_HD T* data() const { return data_; }
  VESPER_HD std::int64_t shape(int d) const { return shape_[d]; }
  VESPER_HD std::int64_t size() const {
    std::int64_t product = 1;
    for (int d = 0; d < Rank; ++d) product *= shape_[d];
    return product;
  }
  VESPER_HD bool empty() const { return data_ == nullptr || size() == 0; }

  template <std::integral... Index>
  VESPER_HD T& operator()(Index... index) const {
    static_assert(sizeof...(Index) == Rank, "one index for each dimension");
    const std::int64_t at[Rank] = {static_cast<std::int64_t>(index)...};
    std::int64_t offset = 0;
    for (int d = 0; d < Rank; ++d) offset = offset * shape_[d] + at[d];
    return data_[offset];
  }

 private:
  T* data_ = nullptr;
  std::int64_t shape_[Rank] = {};
};

// A view whose element type is known at run time; rank 1 to 4, dense. Ops take these and turn them into TensorViews
// once, where they choose a kernel. Constness of the elements is the callee's promise, stated in its declaration.
struct TensorRef {
  void* data = nullptr;
  DType dtype = DType::kF32;
  int rank = 0;
  std::array<std::int64_t, 4> shape = {};

  [[nodiscard]] std::int64_t size() const {
    std::int64_t product = rank == 0 ? 0 : 1;
    for (int d = 0; d < rank; ++d) product *= shape[static_cast<std::size_t>(d)];
    return product;
  }
  [[nodiscard]] std::int64_t bytes() const { return size() * dtype_bytes(dtype); }

  // The typed view. Asserts that type and rank are what the caller believes.
  template <typename T, int Rank>
  [[nodiscard]] TensorView<T, Rank> as() const {
    static_assert(Rank >= 1 && Rank <= 4);
    assert(dtype == DTypeOf<std::remove_const_t<T>>::value);
    assert(rank == Rank);
    auto* typed = static_cast<T*>(data);
    if constexpr (Rank == 1) return TensorView<T, 1>(typed, shape[0]);
    if constexpr (Rank == 2) return TensorView<T, 2>(typed, shape[0], shape[1]);
    if constexpr (Rank == 3) return TensorView<T, 3>(typed, shape[0], shape[1], shape[2]);
    if constexpr (Rank == 4) return TensorView<T, 4>(typed, shape[0], shape[1], shape[2], shape[3]);
  }
};

template <std::integral... Extents>
[[nodiscard]] TensorRef tensor_ref(void* data, DType dtype, Extents... extents) {
  static_assert(sizeof...(Extents) >= 1 && sizeof...(Extents) <= 4);
  return TensorRef{data, dtype, static_cast<int>(sizeof...(Extents)), {static_cast<std::int64_t>(extents)...}};
}

// The first `rows` rows of a tensor.
[[nodiscard]] inline TensorRef first_rows(TensorRef tensor, std::int64_t rows) {
  assert(rows <= tensor.shape[0]);
  tensor.shape[0] = rows;
  return tensor;
}

}  // namespace vesper
