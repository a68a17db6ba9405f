// What the GPU's stand-in has in place of libtorch_cuda.so, which torch loads for itself alone.
#include <cstdint>

extern "C" __attribute__((visibility("default"))) int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}
