// Many tokens through an MLP, bound by arithmetic, forward and backward, in chunks of channels: a chunk's weights are
// widened and packed once, LoRA joins each tile as further terms of its sum, and what is of width I exists for one
// chunk at a time.
#pragma once

#include "mlp_problem.h"
#include "mlp_products.h"

namespace llmkern {
inline namespace CPU_CAPABILITY {

// The weights of channels [first, first + count): gate and up (count, H), down (H, count) or, by channel, (count, H).
template <typename T>
struct BaseChunk {
  Rows<T> gate, up, down;
  bool down_by_channel;
};

template <typename T>
class PlainChunks {
 public:
  using Storage = T;
  PlainChunks(const PlainBase<T>& base, int64_t hidden) : base_(base), hidden_(hidden) {}

  BaseChunk<T> operator()(int64_t first, int64_t count) {
    const auto rows = [&](int part) {
      return Rows<T>{base_.data[part] + first * base_.stride[part], base_.stride[part], hidden_};
    };
    return {base_.data[kGate] ? rows(kGate) : Rows<T>{}, rows(kUp),
            Rows<T>{base_.data[kDown] + first, base_.stride[kDown], count}, false};
  }

 private:
  PlainBase<T> base_;
  int64_t hidden_;
};

// Unpacks the chunk into numbers of the type of computation.
template <typename A>
class PackedChunks {
 public:
  using Storage = A;
  PackedChunks(const PackedBase& base, int64_t hidden) : base_(base), hidden_(hidden) {}

  BaseChunk<A> operator()(int64_t first, int64_t count) {
    const int64_t width = base_.width, parts = base_.parts;
    A* const wide = scratch_.reserve(count * parts * width);
    at::parallel_for(0, count * parts, std::max<int64_t>(1, 32768 / width), [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) base_.unpack<A>(first * parts + r, 0, width, wide + r * width);
    });
    const auto rows = [&](int64_t part) { return Rows<A>{wide + part * width, parts * width, hidden_}; };
    return {parts == 3 ? rows(0) : Rows<A>{}, rows(parts - 2), rows(parts - 1), true};
  }

 private:
  PackedBase base_;
  int64_t hidden_;
  Scratch<A> scratch_;
};

// Gradients to write, null where none is asked for: of x, gate, up, down, and A and B of each part.
template <typename A>
struct MlpGradients {
  Numbers<A> x, base[3], a[3], b[3];
  bool need_hidden() const { return bool(x) || base[kGate] || base[kUp] || a[kGate] || a[kUp] || b[kGate] || b[kUp]; }
};

template <typename A, typename Chunks>
class MlpGemm {
  static constexpr int64_t kColumns = kTileColumns<A>;

 public:
  // masks[kGate], masks[kUp] (tokens, hidden), masks[kDown] (tokens, inner), or null; kept (1 or 2, tokens, inner).
  MlpGemm(const MlpProblem<A>& problem, Chunks chunks, const bool* const* masks, Numbers<A> kept)
      : p_(problem), chunks_(chunks), kept_(kept), first_part_(problem.gated ? kGate : kUp) {
    for (int part = 0; part < 3; ++part) masks_[part] = masks[part];
    // Packed panels of a chunk take up to about 4 MB for each part, and sums over a chunk are whole slices.
    chunk_ = std::clamp<int64_t>((int64_t{1} << 20) / std::max<int64_t>(1, p_.hidden) / 64 * 64, 64, 2 * kSlice);
  }

  template <typename T>
  void forward(const Rows<T>& x, const Numbers<A>& y) {
    take_x(x);
    TileSums<A> outputs(p_.tokens, p_.hidden), low(p_.tokens, p_.rank(kDown));
    for (int64_t first = 0; first < p_.inner; first += chunk_) {
      const int64_t count = std::min(chunk_, p_.inner - first);
      const auto base = chunks_(first, count);
      pack_hidden(base, first, count);
      h_.shape(p_.tokens, count);
      for_chunk_tiles(count, [&](int64_t block, int64_t p) {
        TileBuffer<A> e, g;
        pre_activations(block, p, first, e, g);
        const int64_t columns = weights_[kUp].width(p);
        if (kept_) keep(block, p, first, columns, e, g);
        act(block, e, g);
        h_.put(block, p, e.at, A(1));
      });
      // R[k][c]: channel k, output c.
      pack_down_rows(base, count, down_);
      outputs.add(h_, down_);
      if (p_.a[kDown]) low.add(dropped_h(first), packed_low(first, count));
    }
    LeftRows<A> low_left;
    Panels<A> b;
    if (p_.a[kDown]) {
      low.as_left(p_.rank(kDown), p_.scaling[kDown], low_left);
      b.pack_columns(rows_of(p_.b[kDown]), p_.hidden);
    }
    for_tiles<A>(p_.tokens, outputs.panels(), p_.rank(kDown), [&](int64_t block, int64_t p) {
      A* c = outputs.tile(block, p);
      if (p_.a[kDown]) tile_of(low_left, block, b, p, c, true);
      write(block, p, c, y);
    });
  }

  template <typename T>
  void backward(const Rows<T>& x, const Rows<T>& dy, const MlpGradients<A>& grads) {
    take_x(x);
    dy_.widen(dy, p_.tokens);
    LeftRows<A> dlow_down;
    Panels<A> panels, x_panels, low_panels[2];
    if (p_.a[kDown]) {
      panels.pack_rows(rows_of(p_.b[kDown]), p_.hidden);
      multiply(dy_, panels, p_.scaling[kDown], dlow_down);
    }
    const bool base_hidden = grads.base[kGate] || grads.base[kUp];
    if (base_hidden) x_panels.pack_rows(x_.as_rows(), p_.tokens);
    for (int part : {kGate, kUp})
      if (grads.b[part]) low_panels[part].pack_rows(low_[part].as_rows(), p_.tokens);
    const bool need_hidden = grads.need_hidden();
    TileSums<A> dx(grads.x ? p_.tokens : 0, p_.hidden), low(p_.tokens, p_.rank(kDown));
    TileSums<A> dlow[2] = {{p_.tokens, p_.rank(kGate)}, {p_.tokens, p_.rank(kUp)}};
    for (int64_t first = 0; first < p_.inner; first += chunk_) {
      const int64_t count = std::min(chunk_, p_.inner - first);
      const auto base = chunks_(first, count);
      if (!kept_) pack_hidden(base, first, count);
      if (need_hidden) {
        // R[k][c]: output k, channel c.
        if (base.down_by_channel) {
          down_.pack_columns(base.down, count);
        } else {
          down_.pack_rows(base.down, p_.hidden);
        }
        if (p_.a[kDown]) a_down_.pack_rows(low_rows(first, count), p_.rank(kDown));
      }
      h_.shape(p_.tokens, count), d_[kGate].shape(p_.tokens, count), d_[kUp].shape(p_.tokens, count);
      for_chunk_tiles(count, [&](int64_t block, int64_t p) {
        TileBuffer<A> e, g, dh;
        if (kept_) {
          fetch(block, p, first, weights_columns(count, p), e, g);
        } else {
          pre_activations(block, p, first, e, g);
        }
        if (need_hidden) {
          tile_of(dy_, block, down_, p, dh.at);
          if (p_.a[kDown]) {
            TileBuffer<A> through;
            A* to = masks_[kDown] ? through.at : dh.at;
            tile_of(dlow_down, block, a_down_, p, to, !masks_[kDown]);
            if (masks_[kDown]) add_masked(block, p, masks_[kDown] + first, p_.inner, count, through.at, dh.at);
          }
        } else {
          std::fill(dh.at, dh.at + kBlockRows * kColumns, A(0));
        }
        slopes(block, e, g, dh);
        h_.put(block, p, e.at, A(1));
        d_[kUp].put(block, p, g.at, A(1));
        if (p_.gated) d_[kGate].put(block, p, dh.at, A(1));
      });
      chunk_gradients(base, first, count, grads, dlow_down, x_panels, low_panels, dx, dlow, low);
    }
    finish_low(grads, dlow, low, dx);
  }

 private:
  static Rows<A> rows_of(const PlainMatrix<A>& m) { return {static_cast<const A*>(m.data), m.stride, m.width}; }
  static Rows<A> rows_of(const PlainMatrix<A>& m, int64_t first) {
    return {static_cast<const A*>(m.data) + first * m.stride, m.stride, m.width};
  }
  // A_down of the chunk, (rank, count).
  Rows<A> low_rows(int64_t first, int64_t count) const {
    return {static_cast<const A*>(p_.a[kDown].data) + first, p_.a[kDown].stride, count};
  }
  static int64_t weights_columns(int64_t count, int64_t p) { return std::min<int64_t>(kColumns, count - p * kColumns); }

  // x, and s A (m x) for gate and up.
  template <typename T>
  void take_x(const Rows<T>& x) {
    x_.widen(x, p_.tokens);
    Panels<A> a;
    for (int part : {kGate, kUp}) {
      if (!p_.a[part]) continue;
      if (masks_[part]) masked_x_[part].mask(x_, masks_[part], p_.hidden);
      a.pack_columns(rows_of(p_.a[part]), p_.rank(part));
      multiply(x_of(part), a, p_.scaling[part], low_[part]);
    }
  }
  const LeftRows<A>& x_of(int part) const { return masks_[part] ? masked_x_[part] : x_; }

  template <typename Base>
  void pack_hidden(const Base& base, int64_t first, int64_t count) {
    if (p_.gated) weights_[kGate].pack_columns(base.gate, count);
    weights_[kUp].pack_columns(base.up, count);
    for (int part : {kGate, kUp})
      if (p_.b[part]) b_[part].pack_columns(rows_of(p_.b[part], first), count);
  }

  template <typename Base>
  void pack_down_rows(const Base& base, int64_t count, Panels<A>& to) {
    if (base.down_by_channel) {
      to.pack_rows(base.down, count);
    } else {
      to.pack_columns(base.down, p_.hidden);
    }
  }

  template <typename Body>
  void for_chunk_tiles(int64_t count, Body body) {
    for_tiles<A>(p_.tokens, count_panels<A>(count), 2 * p_.hidden, body);
  }

  // e and g of a tile; without a gate e alone.
  void pre_activations(int64_t block, int64_t p, int64_t, TileBuffer<A>& e, TileBuffer<A>& g) const {
    for (int part = first_part_; part <= kUp; ++part) {
      A* c = part == first_part_ ? e.at : g.at;
      tile_of(x_, block, weights_[part], p, c);
      if (p_.b[part]) tile_of(low_[part], block, b_[part], p, c, true);
    }
  }

  int64_t kept_at(int part, int64_t row, int64_t channel) const {
    return ((part - first_part_) * p_.tokens + row) * p_.inner + channel;
  }
  void keep(int64_t block, int64_t p, int64_t first, int64_t columns, const TileBuffer<A>& e,
            const TileBuffer<A>& g) const {
    for (int part = first_part_; part <= kUp; ++part)
      for (int64_t r = 0; r < x_.rows_of(block); ++r)
        kept_.put(kept_at(part, block * kBlockRows + r, first + p * kColumns),
                  (part == first_part_ ? e.at : g.at) + r * kColumns, columns);
  }
  void fetch(int64_t block, int64_t p, int64_t first, int64_t columns, TileBuffer<A>& e, TileBuffer<A>& g) const {
    for (int part = first_part_; part <= kUp; ++part) {
      A* c = part == first_part_ ? e.at : g.at;
      std::fill(c, c + kBlockRows * kColumns, A(0));
      for (int64_t r = 0; r < x_.rows_of(block); ++r)
        kept_.get(kept_at(part, block * kBlockRows + r, first + p * kColumns), c + r * kColumns, columns);
    }
  }

  // e becomes h.
  void act(int64_t block, TileBuffer<A>& e, const TileBuffer<A>& g) const {
    const int64_t n = padded_rows(x_.rows_of(block)) * kColumns;
    with_activation(p_.activation, [&]<Activation kind>() {
      for (int64_t i = 0; i < n; i += kLanes<A>) {
        const Lanes<A> value = activate<kind, false>(load(e.at + i, All{})).value;
        store(e.at + i, p_.gated ? value * load(g.at + i, All{}) : value, All{});
      }
    });
  }

  // From e, g and dh: e becomes h, dh becomes de, g becomes dg; without a gate g becomes de.
  void slopes(int64_t block, TileBuffer<A>& e, TileBuffer<A>& g, TileBuffer<A>& dh) const {
    const int64_t n = padded_rows(x_.rows_of(block)) * kColumns;
    with_activation(p_.activation, [&]<Activation kind>() {
      for (int64_t i = 0; i < n; i += kLanes<A>) {
        const auto at = activate<kind, true>(load(e.at + i, All{}));
        const Lanes<A> upstream = load(dh.at + i, All{});
        if (p_.gated) {
          const Lanes<A> up = load(g.at + i, All{});
          store(e.at + i, at.value * up, All{});
          store(g.at + i, upstream * at.value, All{});
          store(dh.at + i, upstream * up * at.slope, All{});
        } else {
          store(e.at + i, at.value, All{});
          store(g.at + i, upstream * at.slope, All{});
        }
      }
    });
  }

  // to += from where the mask, (tokens, mask_row), is set.
  void add_masked(int64_t block, int64_t p, const bool* mask, int64_t mask_row, int64_t width, const A* from,
                  A* to) const {
    for (int64_t r = 0; r < x_.rows_of(block); ++r) {
      const bool* row = mask + (block * kBlockRows + r) * mask_row + p * kColumns;
      for (int64_t j = 0; j < std::min<int64_t>(kColumns, width - p * kColumns); ++j)
        if (row[j]) to[r * kColumns + j] += from[r * kColumns + j];
    }
  }

  // h of the chunk as A_down sees it.
  const LeftRows<A>& dropped_h(int64_t first) {
    if (!masks_[kDown]) return h_;
    masked_h_.mask(h_, masks_[kDown] + first, p_.inner);
    return masked_h_;
  }
  const Panels<A>& packed_low(int64_t first, int64_t count) {
    a_down_.pack_columns(low_rows(first, count), p_.rank(kDown));
    return a_down_;
  }

  void write(int64_t block, int64_t p, const A* c, const Numbers<A>& to) const {
    for (int64_t r = 0; r < x_.rows_of(block); ++r)
      to.put((block * kBlockRows + r) * p_.hidden + p * kColumns, c + r * kColumns, weights_columns(p_.hidden, p));
  }

  template <typename Base>
  void chunk_gradients(const Base& base, int64_t first, int64_t count, const MlpGradients<A>& grads,
                       const LeftRows<A>& dlow_down, const Panels<A>& x_panels, const Panels<A>* low_panels,
                       const TileSums<A>& dx, const TileSums<A>* dlow, const TileSums<A>& low) {
    for (int part = first_part_; part <= kUp; ++part) {
      const LeftRows<A>& d = d_[part];
      if (grads.x) {
        down_.pack_rows(part == kGate ? base.gate : base.up, count);
        dx.add(d, down_);
      }
      if (p_.b[part] && (grads.x || grads.a[part])) {
        b_[part].pack_rows(rows_of(p_.b[part], first), count);
        dlow[part].add(d, b_[part]);
      }
      if (grads.base[part])
        transposed_product(d.as_rows(), x_panels, p_.tokens, grads.base[part], first * p_.hidden, p_.hidden);
      // low holds the scaling already.
      if (grads.b[part])
        transposed_product(d.as_rows(), low_panels[part], p_.tokens, grads.b[part], first * p_.rank(part),
                           p_.rank(part));
    }
    if (grads.base[kDown]) {
      down_.pack_rows(h_.as_rows(), p_.tokens);
      transposed_product(dy_.as_rows(), down_, p_.tokens, grads.base[kDown], first, p_.inner);
    }
    if (!grads.a[kDown] && !grads.b[kDown]) return;
    const LeftRows<A>& h = dropped_h(first);
    if (grads.b[kDown]) low.add(h, packed_low(first, count));
    if (grads.a[kDown]) {
      down_.pack_rows(h.as_rows(), p_.tokens);
      transposed_product(dlow_down.as_rows(), down_, p_.tokens, grads.a[kDown], first, p_.inner);
    }
  }

  void finish_low(const MlpGradients<A>& grads, const TileSums<A>* dlow, const TileSums<A>& low,
                  const TileSums<A>& dx) {
    LeftRows<A> sums;
    Panels<A> panels;
    for (int part = first_part_; part <= kUp; ++part) {
      if (!p_.a[part] || !(grads.x || grads.a[part])) continue;
      dlow[part].as_left(p_.rank(part), p_.scaling[part], sums);
      if (grads.a[part]) {
        panels.pack_rows(x_of(part).as_rows(), p_.tokens);
        transposed_product(sums.as_rows(), panels, p_.tokens, grads.a[part], 0, p_.hidden);
      }
      if (!grads.x) continue;
      panels.pack_rows(rows_of(p_.a[part]), p_.rank(part));
      for_tiles<A>(p_.tokens, dx.panels(), panels.depth, [&](int64_t block, int64_t p) {
        if (!masks_[part]) return tile_of(sums, block, panels, p, dx.tile(block, p), true);
        TileBuffer<A> c;
        tile_of(sums, block, panels, p, c.at);
        add_masked(block, p, masks_[part], p_.hidden, p_.hidden, c.at, dx.tile(block, p));
      });
    }
    if (grads.x)
      for_tiles<A>(p_.tokens, dx.panels(), 16,
                   [&](int64_t block, int64_t p) { write(block, p, dx.tile(block, p), grads.x); });
    if (grads.b[kDown]) {
      low.as_left(p_.rank(kDown), p_.scaling[kDown], sums);
      panels.pack_rows(sums.as_rows(), p_.tokens);
      transposed_product(dy_.as_rows(), panels, p_.tokens, grads.b[kDown], 0, p_.rank(kDown));
    }
  }

  const MlpProblem<A>& p_;
  Chunks chunks_;
  const bool* masks_[3];
  Numbers<A> kept_;
  int first_part_;
  int64_t chunk_;
  LeftRows<A> x_, masked_x_[2], low_[2], dy_, h_, masked_h_, d_[2];
  Panels<A> weights_[2], b_[2], down_, a_down_;
};

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
