// The route of toeplitz_attention by transforms on the CPU: the dispatcher's end of toeplitz_fourier.h.
#include "toeplitz_fourier.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <tuple>

namespace llmkern {
inline namespace CPU_CAPABILITY {
namespace {

// Tasks go in this many parts, each of which sums on its own, in order.
constexpr int64_t kParts = 8;

// One head; see the schema for the tensors.
template <typename A>
struct Call {
  at::Tensor x, y, columns, symbols, coefficients, moments;
  std::shared_ptr<const Transform<A>> transform;
  Sequences sequences;

  Call(const at::Tensor& x_, const at::Tensor& y_, const at::Tensor& columns_, const at::Tensor& circle,
       const at::Tensor& coefficients_, const at::Tensor& moments_, bool by_column)
      : x(x_.contiguous()),
        y(y_.contiguous()),
        columns(columns_.t().contiguous()),
        coefficients(coefficients_.contiguous()),
        moments(moments_.contiguous()),
        transform(Transform<A>::of(circle.size(1))),
        sequences{x.size(0), columns.size(0), circle.size(0) > 1, by_column} {
    TORCH_CHECK_VALUE(circle.size(1) >= x.size(1) + y.size(1) - 1, "toeplitz_attention: expected a circle of at least ",
                      x.size(1) + y.size(1) - 1, " distances, got ", circle.size(1));
    TORCH_CHECK_VALUE(circle.size(0) == 1 || circle.size(0) == x.size(0), "toeplitz_attention: expected one symbol or ",
                      x.size(0), ", got ", circle.size(0));
    symbols = circle.div(static_cast<double>(circle.size(1))).contiguous();
    if (sequences.own_symbols) return;
    const at::Tensor spectrum = at::empty({2, transform->length()}, x.options()), buffer = buffers(1);
    transform_shared(*transform, symbols.const_data_ptr<A>(), buffer.mutable_data_ptr<A>(),
                     spectrum.mutable_data_ptr<A>());
    symbols = spectrum;
  }

  at::Tensor buffers(int64_t count) const {
    return at::empty({count, transform->length() * Transform<A>::kElement}, x.options());
  }
  int64_t tasks() const { return sequences.tasks<A>(); }
  int64_t parts() const { return std::min(kParts, tasks()); }
  // First task of a part.
  int64_t begin(int64_t part) const { return part * tasks() / parts(); }
  FourierProblem<A> problem() const {
    return {*transform,
            sequences,
            rows(x),
            rows(y),
            rows(columns),
            coefficients.const_data_ptr<A>(),
            moments.const_data_ptr<A>(),
            rows(symbols)};
  }
  static Rows<A> rows(const at::Tensor& t) { return {t.const_data_ptr<A>(), t.size(1)}; }

  // body(part, buffers): each part by one thread.
  template <typename Body>
  void for_parts(int64_t count, Body body) const {
    const int64_t parts = this->parts();
    std::atomic<int64_t> next{0};
    at::parallel_for(0, std::min<int64_t>(parts, at::get_num_threads()), 1, [&](int64_t, int64_t) {
      const at::Tensor scratch = buffers(count);
      std::vector<A*> each;
      for (int64_t b = 0; b < count; ++b) each.push_back(scratch.mutable_data_ptr<A>() + b * scratch.size(1));
      each.resize(4, nullptr);
      for (int64_t part = next++; part < parts; part = next++) body(part, each.data());
    });
  }
};

// Sums that tasks or parts of a call make on their own, (their number, rows, tokens).
template <typename A>
class Partial {
 public:
  Partial(int64_t count, int64_t rows, int64_t tokens, const at::Tensor& like)
      : sums_(at::zeros({count, rows, tokens}, like.options())) {}
  Sums<A> of(int64_t number, int64_t first = 0) const {
    return {sums_.mutable_data_ptr<A>() + number * sums_.size(1) * sums_.size(2), sums_.size(2), first};
  }
  at::Tensor total() const {
    at::Tensor total = sums_.select(0, 0);
    for (int64_t i = 1; i < sums_.size(0); ++i) total = total.add_(sums_.select(0, i));
    return total;
  }
  // Rows of every part added to those of all, of which part ``number`` holds those from first(number) on.
  template <typename First>
  at::Tensor spread(int64_t count, First first) const {
    const at::Tensor all = at::zeros({count, sums_.size(2)}, sums_.options());
    for (int64_t i = 0; i < sums_.size(0); ++i) {
      const int64_t rows = std::min(sums_.size(1), count - first(i));
      all.narrow(0, first(i), rows).add_(sums_.select(0, i).narrow(0, 0, rows));
    }
    return all;
  }

 private:
  at::Tensor sums_;
};

at::Tensor toeplitz_fourier_fwd(const at::Tensor& x, const at::Tensor& y, const at::Tensor& columns,
                                const at::Tensor& circle, const at::Tensor& coefficients, const at::Tensor& moments) {
  at::Tensor out;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "toeplitz_fourier_fwd", [&] {
    using A = scalar_t;
    const Call<A> call(x, y, columns, circle, coefficients, moments, true);
    const FourierProblem<A> in = call.problem();
    const int64_t rows = columns.size(1) + 1;
    const auto columns_of = [&](int64_t part) {
      return call.sequences.columns_of<A>(call.begin(part), call.begin(part + 1));
    };
    int64_t most = 0;
    for (int64_t part = 0; part < call.parts(); ++part) {
      const auto [begin, end] = columns_of(part);
      most = std::max(most, end - begin);
    }
    const Partial<A> sums(call.parts(), most, x.size(1), x);
    call.for_parts(call.sequences.own_symbols ? 2 : 1, [&](int64_t part, A* const* buffers) {
      for (int64_t task = call.begin(part); task < call.begin(part + 1); ++task)
        fourier_forward(in, task, buffers, sums.of(part, columns_of(part).first));
    });
    out = sums.spread(rows, [&](int64_t part) { return columns_of(part).first; }).t();
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> toeplitz_fourier_bwd(
    const at::Tensor& grad, const at::Tensor& x, const at::Tensor& y, const at::Tensor& columns,
    const at::Tensor& circle, const at::Tensor& coefficients, bool want_symbols) {
  at::Tensor dx, dy, dcolumns, dcircle = at::empty({0}, circle.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "toeplitz_fourier_bwd", [&] {
    using A = scalar_t;
    const Call<A> call(x, y, columns, circle, coefficients, coefficients, false);
    const FourierProblem<A> in = call.problem();
    const at::Tensor slope = grad.t().contiguous();
    const bool own = call.sequences.own_symbols, shared = want_symbols && !own;
    const int64_t features = x.size(0), length = circle.size(1);
    const auto first_of = [&](int64_t task) { return call.sequences.features_of<A>(task).first; };
    int64_t most = 1;
    for (int64_t task = 0; task < call.tasks(); ++task) {
      const auto [begin, end] = call.sequences.features_of<A>(task);
      most = std::max(most, end - begin);
    }
    const Partial<A> of_x(call.tasks(), most, x.size(1), x), of_y(call.tasks(), most, y.size(1), x),
        of_columns(call.parts(), columns.size(1), y.size(1), x),
        of_symbols(call.tasks(), most, want_symbols && own ? length : 0, x),
        of_spectrum(call.parts(), 2, shared ? length : 0, x);
    call.for_parts(want_symbols && own ? 4
                   : own               ? 3
                                       : 2,
                   [&](int64_t part, A* const* buffers) {
                     for (int64_t task = call.begin(part); task < call.begin(part + 1); ++task) {
                       const int64_t begin = first_of(task);
                       const FourierGradients<A> to{
                           Call<A>::rows(slope),
                           of_x.of(task, begin),
                           of_y.of(task, begin),
                           of_columns.of(part),
                           shared ? of_spectrum.of(part).at : nullptr,
                           want_symbols && own ? of_symbols.of(task, begin) : Sums<A>{nullptr, 0, 0}};
                       fourier_backward(in, task, buffers, to);
                     }
                   });
    dx = of_x.spread(features, first_of);
    dy = of_y.spread(features, first_of);
    dcolumns = of_columns.total().t();
    if (shared) {
      const at::Tensor spectrum = of_spectrum.total(), buffer = call.buffers(1);
      dcircle = at::empty(circle.sizes(), x.options());
      transform_shared_back(*call.transform, spectrum.const_data_ptr<A>(), buffer.mutable_data_ptr<A>(),
                            dcircle.mutable_data_ptr<A>());
    } else if (want_symbols) {
      dcircle = of_symbols.spread(features, first_of);
    }
    if (want_symbols) dcircle.div_(static_cast<double>(length));
  });
  return {dx, dy, dcolumns, dcircle};
}

}  // namespace

void register_toeplitz_fourier(torch::Library& library) {
  library.impl("toeplitz_fourier_fwd", &toeplitz_fourier_fwd);
  library.impl("toeplitz_fourier_bwd", &toeplitz_fourier_bwd);
}

}  // namespace CPU_CAPABILITY
}  // namespace llmkern
