// The Python module of one instruction set. Nothing is registered when it loads: the loader compares build_info() with
// what it expects and only then calls register_ops(), so that a stale build is an ImportError and not an abort.
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <map>
#include <memory>
#include <string>

#define LLMKERN_TEXT_(x) #x
#define LLMKERN_TEXT(x) LLMKERN_TEXT_(x)

namespace llmkern {
inline namespace CPU_CAPABILITY {
void register_mix_logits(torch::Library& library);
void register_pairwise_scores(torch::Library& library);
void register_rope_attention(torch::Library& library);
void register_sample_mixed(torch::Library& library);
void register_shared_lora_mlp(torch::Library& library);
void register_toeplitz_attention(torch::Library& library);
void register_toeplitz_fourier(torch::Library& library);
void register_vas_score(torch::Library& library);
}  // namespace CPU_CAPABILITY

namespace {

// Also found by its first word in the bytes of a module that does not load.
const char kStamp[] = "llmkern-build:torch=" LLMKERN_TEXT(LLMKERN_TORCH) ";isa=" LLMKERN_TEXT(
    LLMKERN_ISA) ";schemas=" LLMKERN_TEXT(LLMKERN_SCHEMAS) ";";

std::map<std::string, std::string> build_info() {
  std::map<std::string, std::string> info;
  std::string stamp(kStamp);
  stamp.erase(0, stamp.find(':') + 1);
  while (!stamp.empty()) {
    const auto equals = stamp.find('='), end = stamp.find(';');
    info[stamp.substr(0, equals)] = stamp.substr(equals + 1, end - equals - 1);
    stamp.erase(0, end + 1);
  }
  return info;
}

// Whether kernels may multiply pairs of bfloat16 here: plans ask.
bool multiplies_bf16() {
#if defined(CPU_CAPABILITY_AVX512)
  return __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

void register_ops() {
  // Kernels stay registered as long as this object lives, which is for good.
  static torch::Library library(torch::Library::IMPL, "llmkern", c10::DispatchKey::CPU, __FILE__, __LINE__);
  static bool registered = false;
  if (std::exchange(registered, true)) return;
  register_mix_logits(library);
  register_pairwise_scores(library);
  register_rope_attention(library);
  register_sample_mixed(library);
  register_shared_lora_mlp(library);
  register_toeplitz_attention(library);
  register_toeplitz_fourier(library);
  register_vas_score(library);
}

}  // namespace
}  // namespace llmkern

PYBIND11_MODULE(LLMKERN_MODULE, m) {
  m.def("build_info", [] {
    pybind11::dict info;
    for (const auto& [key, value] : llmkern::build_info()) info[pybind11::str(key)] = value;
    info["bf16"] = llmkern::multiplies_bf16() ? "pairs" : "";
    return info;
  });
  m.def("register_ops", &llmkern::register_ops);
}
