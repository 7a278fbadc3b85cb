// The route of toeplitz_attention by transforms on the CPU: the dispatcher's end of toeplitz_fourier.h.
#include "toeplitz_fourier.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

namespace llmkern {
inline namespace CPU_CAPABILITY {
namespace {

// A call goes in about this many parts, each of which sums on its own, in order; and where there are columns enough
// a part has about this many of them.
constexpr int64_t kParts = 8, kColumns = 4;

// Rows of distances -(keys - 1) .. rows - 1 <-> rows on a circle, where negative ones are counted from its end.
at::Tensor on_circle(const at::Tensor& symbols, int64_t rows, int64_t length) {
  const int64_t keys = symbols.size(1) - rows + 1;
  const at::Tensor circle = at::zeros({symbols.size(0), length}, symbols.options());
  circle.narrow(1, 0, rows).copy_(symbols.narrow(1, keys - 1, rows));
  circle.narrow(1, length - keys + 1, keys - 1).copy_(symbols.narrow(1, 0, keys - 1));
  return circle;
}

at::Tensor off_circle(const at::Tensor& circle, int64_t rows, int64_t keys) {
  return at::cat({circle.narrow(1, circle.size(1) - keys + 1, keys - 1), circle.narrow(1, 0, rows)}, 1);
}

// One head; see the schema for the tensors.
template <typename A>
struct Call {
  at::Tensor x, y, columns, symbols, coefficients, moments;
  std::shared_ptr<const Transform<A>> transform;
  bool own_symbols;
  std::vector<Part> parts;

  Call(const at::Tensor& x_, const at::Tensor& y_, const at::Tensor& columns_, const at::Tensor& symbols_,
       const at::Tensor& coefficients_, const at::Tensor& moments_)
      : x(x_.contiguous()),
        y(y_.contiguous()),
        columns(columns_.t().contiguous()),
        coefficients(coefficients_.contiguous()),
        moments(moments_.contiguous()),
        transform(Transform<A>::of(symbols_.size(1))),
        own_symbols(symbols_.size(0) > 1) {
    TORCH_CHECK_VALUE(symbols_.size(1) == x.size(1) + y.size(1) - 1, "toeplitz_attention: expected symbols of ",
                      x.size(1) + y.size(1) - 1, " distances, got ", symbols_.size(1));
    TORCH_CHECK_VALUE(symbols_.size(0) == 1 || symbols_.size(0) == x.size(0),
                      "toeplitz_attention: expected one symbol or ", x.size(0), ", got ", symbols_.size(0));
    symbols = on_circle(symbols_, x.size(1), transform->length()).div_(static_cast<double>(transform->length()));
    const int64_t features = x.size(0), width = columns.size(0);
    // By columns too, unless each part would transform the symbol of a feature anew.
    const int64_t across = own_symbols ? 1 : std::clamp<int64_t>(width / kColumns, 1, kParts);
    const int64_t along = std::min(features, kParts / across);
    for (int64_t i = 0; i < along; ++i) {
      for (int64_t j = 0; j < across; ++j) {
        parts.push_back({{i * features / along, (i + 1) * features / along},
                         {j * width / across, (j + 1) * width / across},
                         own_symbols});
      }
    }
    if (own_symbols) return;
    const at::Tensor spectrum = buffers(1);
    transform_symbol(*transform, symbols.const_data_ptr<A>(), spectrum.mutable_data_ptr<A>());
    symbols = spectrum;
  }

  at::Tensor buffers(int64_t count) const { return at::empty({count, transform->buffer_size()}, x.options()); }
  FourierProblem<A> problem() const {
    return {*transform,
            rows(x),
            rows(y),
            rows(columns),
            columns.size(0),
            coefficients.const_data_ptr<A>(),
            moments.const_data_ptr<A>(),
            rows(symbols)};
  }
  static Rows<A> rows(const at::Tensor& t) { return {t.const_data_ptr<A>(), t.size(1)}; }

  // body(number of a part, buffers): each by one thread; the last ones, which have most to do, first.
  template <typename Body>
  void for_parts(int64_t count, Body body) const {
    const int64_t last = static_cast<int64_t>(parts.size());
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(last, at::get_num_threads()), 1, [&](int64_t, int64_t) {
      const at::Tensor scratch = buffers(count);
      std::vector<A*> each;
      for (int64_t b = 0; b < count; ++b) each.push_back(scratch.mutable_data_ptr<A>() + b * scratch.size(1));
      each.resize(4, nullptr);
      for (int64_t done = next++; done < last; done = next++) body(last - 1 - done, each.data());
    });
  }
};

// Sums of rows of ``tokens`` that parts make on their own: ranges[part] of all rows.
template <typename A>
class Partial {
 public:
  Partial(std::vector<Range> ranges, int64_t tokens, const at::Tensor& like) : ranges_(std::move(ranges)) {
    for (const Range& range : ranges_) sums_.push_back(at::zeros({range.size(), tokens}, like.options()));
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
                                const at::Tensor& symbols, const at::Tensor& coefficients, const at::Tensor& moments) {
  at::Tensor out;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "toeplitz_fourier_fwd", [&] {
    using A = scalar_t;
    const Call<A> call(x, y, columns, symbols, coefficients, moments);
    const FourierProblem<A> in = call.problem();
    const auto rows_of = [&](const Part& part) {
      return Range{part.columns.begin, part.columns.end + (part.columns.end == in.width)};
    };
    const Partial<A> sums(ranges_of(call.parts, rows_of), x.size(1), x);
    call.for_parts(call.own_symbols ? 2 : 1, [&](int64_t number, A* const* buffers) {
      const Part& part = call.parts[number];
      for (int64_t task = 0; task < part.tasks(); ++task) fourier_forward(in, part, task, buffers, sums.of(number));
    });
    out = sums.total(in.width + 1).t();
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> toeplitz_fourier_bwd(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& y, const at::Tensor& columns,
    const at::Tensor& symbols, const at::Tensor& coefficients, bool want_symbols) {
  at::Tensor dx, dy, dcolumns, dsymbols = at::empty({0}, symbols.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "toeplitz_fourier_bwd", [&] {
    using A = scalar_t;
    const Call<A> call(x, y, columns, symbols, coefficients, coefficients);
    const FourierProblem<A> in = call.problem();
    const at::Tensor slope = grad.t().contiguous();
    const bool own = want_symbols && call.own_symbols, shared = want_symbols && !own;
    const int64_t features = x.size(0), length = call.transform->length();
    const auto by_feature = ranges_of(call.parts, [](const Part& part) { return part.features; });
    const auto by_column = ranges_of(call.parts, [](const Part& part) { return part.columns; });
    const auto as_one = ranges_of(call.parts, [](const Part&) { return Range{0, 1}; });
    const Partial<A> of_x(by_feature, x.size(1), x), of_y(by_feature, y.size(1), x),
        of_columns(by_column, y.size(1), x), of_symbols(by_feature, own ? length : 0, x),
        of_spectrum(as_one, shared ? call.transform->buffer_size() : 0, x);
    call.for_parts(own                ? 4
                   : call.own_symbols ? 3
                                      : 2,
                   [&](int64_t number, A* const* buffers) {
                     const Part& part = call.parts[number];
                     const FourierGradients<A> to{Call<A>::rows(slope),
                                                  of_x.of(number),
                                                  of_y.of(number),
                                                  of_columns.of(number),
                                                  shared ? of_spectrum.of(number).at : nullptr,
                                                  own ? of_symbols.of(number) : Sums<A>{nullptr, 0, 0}};
                     for (int64_t task = 0; task < part.tasks(); ++task) fourier_backward(in, part, task, buffers, to);
                   });
    dx = of_x.total(features);
    dy = of_y.total(features);
    dcolumns = of_columns.total(in.width).t();
    if (!want_symbols) return;
    at::Tensor circle;
    if (shared) {
      circle = at::zeros({1, length}, x.options());
      transform_symbol_back(*call.transform, of_spectrum.total(1).mutable_data_ptr<A>(), circle.mutable_data_ptr<A>());
    } else {
      circle = of_symbols.total(features);
    }
    dsymbols = off_circle(circle, x.size(1), y.size(1)).div_(static_cast<double>(length));
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
