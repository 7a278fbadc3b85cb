// The route of toeplitz_attention by transforms on the CPU: the dispatcher's end of toeplitz_fourier.h.
#include "toeplitz_fourier.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

namespace llmkern {
inline namespace CPU_CAPABILITY {
namespace {

// A call goes in about this many parts, each of which sums on its own, in order; and where there are columns enough
// a part has about this many of them.
constexpr int64_t kParts = 8, kColumns = 2;

// One head; see the schema for the tensors.
template <typename A>
struct Call {
  std::shared_ptr<const Transform<A>> transform;
  at::Tensor x, y, columns, symbols, coefficients, moments, spectrum;
  std::vector<Factors> factors;
  bool own_symbols;
  std::vector<Part> parts;

  Call(const at::Tensor& x_, const at::Tensor& y_, const at::Tensor& columns_, const at::Tensor& symbols_,
       const at::Tensor& coefficients_, const at::Tensor& moments_, int64_t degree)
      : transform(Transform<A>::of(std::max(x_.size(1), y_.size(1)))),
        x(to_rows(x_)),
        y(to_rows(y_)),
        columns(to_rows(columns_.t())),
        coefficients(coefficients_.contiguous()),
        moments(moments_.contiguous()),
        factors(factors_of(Monomials(x_.size(0), degree, x_.size(0)))),
        own_symbols(symbols_.size(0) > 1) {
    const int64_t queries = x_.size(1), keys = y_.size(1), features = factors.size(), width = columns.size(0);
    TORCH_CHECK_VALUE(symbols_.size(1) == queries + keys - 1, "toeplitz_attention: expected symbols of ",
                      queries + keys - 1, " distances, got ", symbols_.size(1));
    TORCH_CHECK_VALUE(symbols_.size(0) == 1 || symbols_.size(0) == features,
                      "toeplitz_attention: expected one symbol or ", features, ", got ", symbols_.size(0));
    symbols = at::zeros({symbols_.size(0), 2, transform->row_size()}, symbols_.options());
    const at::Tensor scaled = symbols_.div(static_cast<double>(transform->length()));
    for (int64_t s = 0; s < scaled.size(0); ++s) {
      const A* of_distances = scaled.const_data_ptr<A>() + s * scaled.size(1);
      A* circle = symbols.mutable_data_ptr<A>() + s * 2 * transform->row_size();
      transform->to_row(of_distances + keys - 1, 1, 0, queries, circle);
      transform->to_row(of_distances, 1, transform->length() - keys + 1, keys - 1, circle + transform->row_size());
    }
    // By columns too, unless each part would transform the symbol of a feature anew.
    const int64_t across = own_symbols ? 1 : std::clamp<int64_t>(width / kColumns, 1, kParts);
    const int64_t along = std::min(features, kParts / across);
    for (int64_t i = 0; i < along; ++i) {
      for (int64_t j = 0; j < across; ++j) {
        parts.push_back(
            {{i * features / along, (i + 1) * features / along}, {j * width / across, (j + 1) * width / across}});
      }
    }
    if (own_symbols) return;
    spectrum = at::empty({transform->buffer_size()}, x.options());
    transform_symbol(*transform, symbols.const_data_ptr<A>(), spectrum.mutable_data_ptr<A>());
  }

  // (r, tokens), of any strides -> rows as transforms read them.
  at::Tensor to_rows(const at::Tensor& t) const {
    const at::Tensor made = at::empty({t.size(0), transform->row_size()}, t.options());
    at::parallel_for(0, t.size(0), 1, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        transform->to_row(t.const_data_ptr<A>() + r * t.stride(0), t.stride(1), 0, t.size(1),
                          made.mutable_data_ptr<A>() + r * made.size(1));
      }
    });
    return made;
  }
  // Circles -> (S, queries + keys - 1), divided by the length.
  at::Tensor off_circles(const at::Tensor& circles, int64_t queries, int64_t keys) const {
    const at::Tensor made = at::zeros({circles.size(0), queries + keys - 1}, circles.options());
    for (int64_t s = 0; s < circles.size(0); ++s) {
      const A* circle = circles.const_data_ptr<A>() + s * 2 * transform->row_size();
      A* of_distances = made.mutable_data_ptr<A>() + s * made.size(1);
      transform->add_row(circle, 0, queries, of_distances + keys - 1);
      transform->add_row(circle + transform->row_size(), transform->length() - keys + 1, keys - 1, of_distances);
    }
    return made.div_(static_cast<double>(transform->length()));
  }

  FourierProblem<A> problem() const {
    return {*transform,
            factors,
            rows(x),
            rows(y),
            rows(columns),
            columns.size(0),
            coefficients.const_data_ptr<A>(),
            moments.const_data_ptr<A>(),
            {symbols.const_data_ptr<A>(), 2 * transform->row_size()},
            spectrum.defined() ? spectrum.const_data_ptr<A>() : nullptr};
  }
  static Rows<A> rows(const at::Tensor& t) { return {t.const_data_ptr<A>(), t.size(1)}; }

  // body(number of a part, scratch): each by one thread; the last ones, which have most to do, first.
  template <typename Body>
  void for_parts(bool is_backward, Body body) const {
    const int64_t last = static_cast<int64_t>(parts.size()), buffer = transform->buffer_size(),
                  row = transform->row_size();
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(last, at::get_num_threads()), 1, [&](int64_t, int64_t) {
      const int64_t directions = is_backward ? 2 : 1;
      const at::Tensor held = at::empty({directions * ((own_symbols ? 2 : 1) * buffer + 2 * row)}, x.options());
      A* free = held.mutable_data_ptr<A>();
      const auto take = [&](bool is_wanted, int64_t size) {
        A* taken = is_wanted ? free : nullptr;
        free += is_wanted ? size : 0;
        return taken;
      };
      FourierScratch<A> scratch;
      scratch.buffers[0] = take(true, buffer), scratch.buffers[1] = take(is_backward, buffer);
      scratch.x = take(true, row), scratch.y = take(true, row);
      scratch.dx = take(is_backward, row), scratch.dy = take(is_backward, row);
      scratch.spectrum = take(own_symbols, buffer), scratch.dspectrum = take(own_symbols && is_backward, buffer);
      for (int64_t done = next++; done < last; done = next++) body(last - 1 - done, scratch);
    });
  }
};

// Sums of rows that parts make on their own: ranges[part] of all rows.
template <typename A>
class Partial {
 public:
  Partial(std::vector<Range> ranges, int64_t size, const at::Tensor& like) : ranges_(std::move(ranges)) {
    for (const Range& range : ranges_) sums_.push_back(at::zeros({range.size(), size}, like.options()));
  }
  Sums<A> of(int64_t part) const {
    return {sums_[part].mutable_data_ptr<A>(), sums_[part].size(1), ranges_[part].begin};
  }
  at::Tensor total(int64_t rows) const {
    const at::Tensor all = at::zeros({rows, sums_[0].size(1)}, sums_[0].options());
    for (size_t part = 0; part < sums_.size(); ++part)
      all.narrow(0, ranges_[part].begin, ranges_[part].size()).add_(sums_[part]);
    return all;
  }
  // Of rows as transforms write them: (rows, tokens).
  at::Tensor total(int64_t rows, int64_t tokens, const Transform<A>& transform) const {
    const at::Tensor all = at::zeros({rows, tokens}, sums_[0].options());
    at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
      for (size_t part = 0; part < sums_.size(); ++part) {
        const int64_t first = std::max(begin, ranges_[part].begin), last = std::min(end, ranges_[part].end);
        for (int64_t r = first; r < last; ++r)
          transform.add_row(of(part).row(r), 0, tokens, all.mutable_data_ptr<A>() + r * tokens);
      }
    });
    return all;
  }

 private:
  std::vector<Range> ranges_;
  std::vector<at::Tensor> sums_;
};

template <typename Body>
std::vector<Range> ranges_of(const std::vector<Part>& parts, Body body) {
  std::vector<Range> ranges;
  for (const Part& part : parts) ranges.push_back(body(part));
  return ranges;
}

at::Tensor toeplitz_fourier_fwd(const at::Tensor& x, const at::Tensor& y, const at::Tensor& columns,
                                const at::Tensor& symbols, const at::Tensor& coefficients, const at::Tensor& moments,
                                int64_t degree) {
  at::Tensor out;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "toeplitz_fourier_fwd", [&] {
    using A = scalar_t;
    const Call<A> call(x, y, columns, symbols, coefficients, moments, degree);
    const FourierProblem<A> in = call.problem();
    const auto rows_of = [&](const Part& part) {
      return Range{part.columns.begin, part.columns.end + (part.columns.end == in.width)};
    };
    const Partial<A> sums(ranges_of(call.parts, rows_of), call.transform->row_size(), x);
    call.for_parts(false, [&](int64_t number, const FourierScratch<A>& scratch) {
      fourier_forward(in, call.parts[number], scratch, sums.of(number));
    });
    out = sums.total(in.width + 1, x.size(1), in.transform).t();
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> toeplitz_fourier_bwd(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& y, const at::Tensor& columns,
    const at::Tensor& symbols, const at::Tensor& coefficients, int64_t degree, bool want_symbols) {
  at::Tensor dx, dy, dcolumns, dsymbols = at::empty({0}, symbols.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "toeplitz_fourier_bwd", [&] {
    using A = scalar_t;
    const Call<A> call(x, y, columns, symbols, coefficients, coefficients, degree);
    const FourierProblem<A> in = call.problem();
    const at::Tensor slope = call.to_rows(grad.t());
    const bool own = want_symbols && call.own_symbols, shared = want_symbols && !own;
    const int64_t size = call.transform->row_size();
    const auto by_variable = ranges_of(call.parts, [&](const Part&) { return Range{0, x.size(0)}; });
    const auto by_column = ranges_of(call.parts, [](const Part& part) { return part.columns; });
    const auto by_feature = ranges_of(call.parts, [](const Part& part) { return part.features; });
    const auto as_one = ranges_of(call.parts, [](const Part&) { return Range{0, 1}; });
    const Partial<A> of_x(by_variable, size, x), of_y(by_variable, size, x), of_columns(by_column, size, x),
        of_symbols(by_feature, own ? 2 * size : 0, x),
        of_spectrum(as_one, shared ? call.transform->buffer_size() : 0, x);
    call.for_parts(true, [&](int64_t number, const FourierScratch<A>& scratch) {
      const FourierGradients<A> to{Call<A>::rows(slope),
                                   of_x.of(number),
                                   of_y.of(number),
                                   of_columns.of(number),
                                   shared ? of_spectrum.of(number).at : nullptr,
                                   own ? of_symbols.of(number) : Sums<A>{nullptr, 0, 0}};
      fourier_backward(in, call.parts[number], scratch, to);
    });
    dx = of_x.total(x.size(0), x.size(1), in.transform);
    dy = of_y.total(y.size(0), y.size(1), in.transform);
    dcolumns = of_columns.total(in.width, y.size(1), in.transform).t();
    if (!want_symbols) return;
    at::Tensor circles;
    if (shared) {
      circles = at::zeros({1, 2 * size}, x.options());
      transform_symbol_back(*call.transform, of_spectrum.total(1).mutable_data_ptr<A>(), circles.mutable_data_ptr<A>());
    } else {
      circles = of_symbols.total(in.factors.size());
    }
    dsymbols = call.off_circles(circles, x.size(1), y.size(1));
  });
  return {dx, dy, dcolumns, dsymbols};
}

}  // namespace

void register_toeplitz_fourier(torch::Library& library) {
  library.impl("toeplitz_fourier_fwd", &toeplitz_fourier_fwd);
  library.impl("toeplitz_fourier_bwd", &toeplitz_fourier_bwd);
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
