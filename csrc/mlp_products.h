// Matrix products of many tokens, in the type of computation: operands as they are packed once for all threads, and
// results as tiles that a caller finishes while they are in the first-level cache (see gemm.h).
#pragma once

#include "gemm.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

template <typename A>
class Scratch {
 public:
  A* reserve(int64_t n) {
    if (!buffer_.defined() || buffer_.numel() < n) buffer_ = at::empty({n}, c10::CppTypeToScalarType<A>::value);
    return buffer_.template mutable_data_ptr<A>();
  }

 private:
  at::Tensor buffer_;
};

// Numbers in a type of storage that is known at run time only.
template <typename A>
struct Numbers {
  void* data = nullptr;
  at::ScalarType type = at::kFloat;

  explicit operator bool() const { return data != nullptr; }

  template <typename Body>
  void with_type(Body body) const {
    if constexpr (std::is_same_v<A, double>) {
      body(static_cast<double*>(data));
    } else if (type == at::kFloat) {
      body(static_cast<float*>(data));
    } else if (type == at::kBFloat16) {
      body(static_cast<c10::BFloat16*>(data));
    } else {
      body(static_cast<c10::Half*>(data));
    }
  }

  void put(int64_t at, const A* from, int64_t n) const {
    with_type([&](auto* p) {
      for_lanes<A>(0, n, [&](int64_t i, auto lanes) { store(p + at + i, load(from + i, lanes), lanes); });
    });
  }
  void get(int64_t at, A* to, int64_t n) const {
    with_type([&](auto* p) {
      for_lanes<A>(0, n, [&](int64_t i, auto lanes) { store(to + i, load(p + at + i, lanes), lanes); });
    });
  }
};

// A right factor (depth, columns).
template <typename A>
struct Panels {
  int64_t depth = 0, columns = 0;
  Scratch<A> scratch;
  A* data = nullptr;

  void shape(int64_t n_depth, int64_t n_columns) {
    depth = padded_depth<A>(n_depth), columns = n_columns;
    data = scratch.reserve(count() * depth * kTileColumns<A>);
  }
  int64_t count() const { return count_panels<A>(columns); }
  A* panel(int64_t p) const { return data + p * depth * kTileColumns<A>; }
  int64_t width(int64_t p) const { return std::min<int64_t>(kTileColumns<A>, columns - p * kTileColumns<A>); }

  // Column c is row c of x.
  template <typename T>
  void pack_columns(const Rows<T>& x, int64_t n_columns) {
    shape(x.width, n_columns);
    at::parallel_for(0, count(), grain(), [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) pack_rows_as_columns(x, p * kTileColumns<A>, width(p), panel(p));
    });
  }

  // Row k is row k of x.
  template <typename T>
  void pack_rows(const Rows<T>& x, int64_t n_depth) {
    shape(n_depth, x.width);
    at::parallel_for(0, count(), grain(), [&](int64_t first, int64_t last) {
      for (int64_t p = first; p < last; ++p) pack_matrix(x, 0, n_depth, depth, p * kTileColumns<A>, panel(p));
    });
  }

 private:
  int64_t grain() const { return std::max<int64_t>(1, 32768 / (depth * kTileColumns<A> + 1)); }
};

// A left factor: rows of tokens, widened, with zeros around them.
template <typename A>
struct LeftRows {
  int64_t rows = 0, width = 0, stride = 0;
  Scratch<A> scratch;
  A* data = nullptr;

  void shape(int64_t n_rows, int64_t n_width) {
    rows = n_rows, width = n_width, stride = left_stride<A>(n_width);
    data = scratch.reserve(padded_rows(rows) * stride);
  }
  int64_t blocks() const { return count_blocks(rows); }
  int64_t rows_of(int64_t block) const { return std::min<int64_t>(kBlockRows, rows - block * kBlockRows); }
  Left<A> block(int64_t b) const { return {data + b * kBlockRows * stride, stride}; }
  A* row(int64_t r) const { return data + r * stride; }
  Rows<A> as_rows() const { return {data, stride, width}; }

  template <typename T>
  void widen(const Rows<T>& x, int64_t n_rows) {
    shape(n_rows, x.width);
    at::parallel_for(0, blocks(), std::max<int64_t>(1, 32768 / (kBlockRows * stride)),
                     [&](int64_t first, int64_t last) {
                       for (int64_t b = first; b < last; ++b)
                         widen_rows(x, b * kBlockRows, rows_of(b), stride, data + b * kBlockRows * stride);
                     });
  }

  // What `from` holds where the mask (rows, mask_row) is set.
  void mask(const LeftRows& from, const bool* mask, int64_t mask_row) {
    shape(from.rows, from.width);
    at::parallel_for(0, padded_rows(rows), 16, [&](int64_t first, int64_t last) {
      for (int64_t r = first; r < last; ++r)
        for (int64_t k = 0; k < stride; ++k)
          row(r)[k] = r < rows && k < width && mask[r * mask_row + k] ? from.row(r)[k] : A(0);
    });
  }

  // Tile c of the block and the panel p, scaled; beyond the last column zeros.
  void put(int64_t block, int64_t p, const A* c, A scale) {
    const int64_t columns = std::min<int64_t>(kTileColumns<A>, width - p * kTileColumns<A>);
    const int64_t last = (p + 1) * kTileColumns<A> >= width ? stride - p * kTileColumns<A> : kTileColumns<A>;
    for (int64_t r = 0; r < padded_rows(rows_of(block)); ++r) {
      A* to = row(block * kBlockRows + r) + p * kTileColumns<A>;
      for (int64_t j = 0; j < columns; ++j) to[j] = scale * c[r * kTileColumns<A> + j];
      std::fill(to + columns, to + last, A(0));
    }
  }
};

template <typename A>
struct alignas(64) TileBuffer {
  A at[kBlockRows * kTileColumns<A>];
};

// Calls body(block, p0, p1) so that together these are all panels of all blocks of rows, in parallel where `depth`
// makes them worth it. Threads share the rows evenly, of which the last block may have few.
template <typename A, typename Body>
inline void for_strips(int64_t rows, int64_t panels, int64_t depth, Body body) {
  constexpr int64_t kHeight = kBlockRows / kTileRows;
  const int64_t tiles = padded_rows(rows) / kTileRows, flops = kTileRows * kTileColumns<A> * (depth + 1);
  at::parallel_for(0, tiles * panels, std::max<int64_t>(1, 65536 / flops), [&](int64_t first, int64_t last) {
    // A panel of a block belongs to whom its first tile of registers belongs to.
    for (int64_t block = first / (kHeight * panels); block * kHeight * panels < last; ++block) {
      const int64_t begin = block * kHeight * panels, height = std::min(kHeight, tiles - block * kHeight);
      const auto from = [&](int64_t tile) {
        return std::clamp<int64_t>((tile - begin + height - 1) / height, 0, panels);
      };
      if (from(first) < from(last)) body(block, from(first), from(last));
    }
  });
}

// Calls body(block, panel) for all tiles of a product.
template <typename A, typename Body>
inline void for_tiles(int64_t rows, int64_t panels, int64_t depth, Body body) {
  for_strips<A>(rows, panels, depth, [&](int64_t block, int64_t p0, int64_t p1) {
    for (int64_t p = p0; p < p1; ++p) body(block, p);
  });
}

template <typename A>
inline void tile_of(const LeftRows<A>& left, int64_t block, const Panels<A>& right, int64_t p, A* c, bool add = false) {
  panel_product(left.block(block), padded_rows(left.rows_of(block)), right.panel(p), right.depth, c, add);
}

// to = scale left right
template <typename A>
inline void multiply(const LeftRows<A>& left, const Panels<A>& right, A scale, LeftRows<A>& to) {
  to.shape(left.rows, right.columns);
  for_tiles<A>(left.rows, right.count(), right.depth, [&](int64_t block, int64_t p) {
    TileBuffer<A> c;
    tile_of(left, block, right, p, c.at);
    to.put(block, p, c.at, scale);
  });
}

// Sums over chunks of the depth, a tile each.
template <typename A>
class TileSums {
 public:
  TileSums(int64_t rows, int64_t columns)
      : blocks_(count_blocks(rows)),
        rows_(rows),
        panels_(count_panels<A>(columns)),
        buffer_(at::zeros({blocks_ * panels_ * kBlockRows * kTileColumns<A>}, c10::CppTypeToScalarType<A>::value)) {}

  A* tile(int64_t block, int64_t p) const {
    return buffer_.template mutable_data_ptr<A>() + (block * panels_ + p) * kBlockRows * kTileColumns<A>;
  }
  int64_t blocks() const { return blocks_; }
  int64_t panels() const { return panels_; }
  int64_t rows() const { return rows_; }

  void add(const LeftRows<A>& left, const Panels<A>& right) const {
    for_tiles<A>(rows_, panels_, right.depth,
                 [&](int64_t block, int64_t p) { tile_of(left, block, right, p, tile(block, p), true); });
  }

  void as_left(int64_t columns, A scale, LeftRows<A>& to) const {
    to.shape(rows_, columns);
    for (int64_t block = 0; block < blocks_; ++block)
      for (int64_t p = 0; p < panels_; ++p) to.put(block, p, tile(block, p), scale);
  }

 private:
  int64_t blocks_, rows_, panels_;
  at::Tensor buffer_;
};

// out[i * out_row + j] = sum over tokens a[token][i] right[token][j]
template <typename A>
inline void transposed_product(const Rows<A>& a, const Panels<A>& right, int64_t tokens, const Numbers<A>& out,
                               int64_t out_at, int64_t out_row) {
  const int64_t stride = left_stride<A>(right.depth);
  const PerThread<A> scratch(kBlockRows * stride);
  for_strips<A>(a.width, right.count(), right.depth, [&](int64_t block, int64_t p0, int64_t p1) {
    A* const left = scratch.get();
    const int64_t i = block * kBlockRows, count = std::min<int64_t>(kBlockRows, a.width - i);
    widen_transposed(a, i, count, 0, right.depth, tokens, stride, left);
    for (int64_t p = p0; p < p1; ++p) {
      TileBuffer<A> c;
      panel_product(Left<A>{left, stride}, padded_rows(count), right.panel(p), right.depth, c.at);
      for (int64_t r = 0; r < count; ++r)
        out.put(out_at + (i + r) * out_row + p * kTileColumns<A>, c.at + r * kTileColumns<A>, right.width(p));
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
