#include <torch/library.h>
namespace llmkern {
inline namespace CPU_CAPABILITY {
void register_sample_mixed(torch::Library& library) {}
}
}
