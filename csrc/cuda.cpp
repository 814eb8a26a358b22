// Loads libtorch's CUDA half at start-up.
//
// A Rust program links libtorch_cuda by name only, so the linker drops it and
// `Device::cuda_if_available()` would answer CPU. It is loaded here, from the
// folder that libtorch_cpu came from, when the machine has a CUDA driver.
#include <ATen/Context.h>

#include <string>

#include "tch_peft.h"

#if defined(__linux__)
#include <dlfcn.h>

namespace {

std::string libtorch_folder() {
  Dl_info info{};
  if (!dladdr(reinterpret_cast<void*>(&at::globalContext), &info) || !info.dli_fname) return "";
  std::string path = info.dli_fname;
  auto slash = path.rfind('/');
  return slash == std::string::npos ? "" : path.substr(0, slash + 1);
}

std::string load_cuda() {
  if (!dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL)) return "no CUDA driver (libcuda.so.1)";
  auto path = libtorch_folder() + "libtorch_cuda.so";
  if (dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL)) return "loaded " + path;
  const char* reason = dlerror();
  return "CPU-only: " + std::string(reason ? reason : "libtorch_cuda.so was not found");
}

}  // namespace

extern "C" const char* tp_cuda_status() {
  static const std::string status = load_cuda();
  return status.c_str();
}
#else
extern "C" const char* tp_cuda_status() { return "not loaded: only on Linux"; }
#endif
