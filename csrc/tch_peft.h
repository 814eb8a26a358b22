// The C face of the shim. C++ hands operators and nodes to Rust and holds no
// policy. Every function that can fail returns NULL or a message that the
// caller frees with tp_free_message; nothing throws across this border.
#pragma once
#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

namespace tch_peft {
using at::Tensor;

// Takes the tensor out of a heap cell that Rust gave away.
inline Tensor take(Tensor* cell) {
  Tensor value = std::move(*cell);
  delete cell;
  return value;
}

inline char* message(const char* text) { return strdup(text); }

// Runs `f`, turning exceptions into messages.
template <typename F>
char* guarded(F&& f) {
  try {
    f();
    return nullptr;
  } catch (const c10::Error& e) {
    return message(e.what_without_backtrace());
  } catch (const std::exception& e) {
    return message(e.what());
  } catch (...) {
    return message("unknown C++ exception");
  }
}
}  // namespace tch_peft

extern "C" {
using tp_tensor = at::Tensor*;

// How a convolution moves over its input; each list has one entry per
// dimension of the kernel.
struct tp_convolution {
  const int64_t* stride;
  const int64_t* padding;
  const int64_t* dilation;
  size_t dims;
  int64_t groups;
};

// What Rust does for an adapted weight. `site` is Rust's object; a false
// result means that `error` was filled by tp_set_message.
struct tp_site_calls {
  // x · Wᵀ + bias, or x · W + bias if `transposed`; W is matrix number `matrix`
  // of a stack, or below 0 the weight itself.
  bool (*linear)(void* site, tp_tensor x, tp_tensor bias, int64_t matrix, bool transposed, tp_tensor* out,
                 std::string* error);
  // The same for each matrix of a stack, with x a stack as well.
  bool (*batched)(void* site, tp_tensor x, bool transposed, tp_tensor* out, std::string* error);
  bool (*embedding)(void* site, tp_tensor indices, int64_t padding_idx, bool scale_grad_by_freq, bool sparse,
                    tp_tensor* out, std::string* error);
  bool (*convolution)(void* site, tp_tensor x, tp_tensor bias, const tp_convolution* form, tp_tensor* out,
                      std::string* error);
  bool (*dense)(void* site, const char* op, tp_tensor* out, std::string* error);
  const char* (*name)(void* site);
  void (*drop)(void* site);
};

// What Rust does for an autograd node: `grads` has one cell per input, to be
// left NULL where no gradient is needed.
struct tp_node_calls {
  bool (*backward)(void* node, tp_tensor grad, const tp_tensor* saved, size_t n_saved, const bool* needed,
                   tp_tensor* grads, size_t n_inputs, std::string* error);
  void (*drop)(void* node);
};

void tp_free_message(char* text);
void tp_set_message(std::string* error, const char* text, size_t len);

char* tp_attach(tp_tensor weight, const tp_site_calls* calls, void* site);
char* tp_release(tp_tensor weight, tp_tensor dense);
void* tp_site_of(tp_tensor weight, const tp_site_calls* calls);

bool tp_needs_grad(const tp_tensor* inputs, size_t n);
char* tp_record(const tp_tensor* inputs, size_t n_inputs, const tp_tensor* saved, size_t n_saved, tp_tensor output,
                const tp_node_calls* calls, void* node);

char* tp_generator_state(int device, tp_tensor* out);
char* tp_set_generator_state(int device, tp_tensor state);
char* tp_with_cpu_engine(void* context, void (*call)(void* context, uint32_t* words, size_t* used));

char* tp_fused_adamw(const tp_tensor* params, const tp_tensor* grads, const tp_tensor* exp_avgs,
                     const tp_tensor* exp_avg_sqs, const tp_tensor* steps, size_t n, double lr, double beta1,
                     double beta2, double weight_decay, double eps);

// Borrowed tensors.
struct tp_list {
  const tp_tensor* cells;
  size_t len;
};

char* tp_foreach_mul(tp_list self, double factor);
char* tp_foreach_add(tp_list self, tp_list other, double alpha);
char* tp_foreach_add_scalar(tp_list self, double value);
char* tp_foreach_addcmul(tp_list self, tp_list a, tp_list b, double value);
char* tp_foreach_addcdiv(tp_list self, tp_list a, tp_list b, double value);
char* tp_foreach_clamp(tp_list self, double least, double most);
char* tp_unscale(tp_list grads, tp_tensor found_inf, tp_tensor inverse_scale);
char* tp_fused_sgd(tp_list params, tp_list grads, tp_list buffers, double weight_decay, double momentum, double lr,
                   double dampening, bool nesterov, bool is_first_step);

// Whether autocast is on, and for which ScalarType; below 0: leave that as it is.
struct tp_autocast {
  bool enabled;
  int kind;
};

tp_autocast tp_set_autocast(int device, tp_autocast to);
void tp_autocast_enter();
void tp_autocast_leave();
bool tp_set_autocast_cache(bool on);
char* tp_backward(tp_tensor output, tp_tensor grad);
char* tp_set_grad(tp_tensor parameter, tp_tensor grad);

int tp_autocast_kind(int device);
bool tp_set_graph_executor_optimize(bool on);
char* tp_module_types(void* module, void* sink, void (*visit)(void* sink, const char* path, const char* type,
                                                             int64_t groups));
char* tp_module_buffers(void* module, void* sink, void (*visit)(void* sink, const char* path, tp_tensor tensor));
char* tp_module_set_training(void* module, bool on);
void tp_trim_heap();

char* tp_parallel_for(size_t n, void* context, bool (*call)(void* context, size_t begin, size_t end, std::string* error));
bool tp_has_onednn();
char* tp_onednn_linear(tp_tensor x, tp_tensor w, tp_tensor* out);
char* tp_addmm(tp_tensor out, tp_tensor a, tp_tensor b, double beta, double alpha);

const char* tp_cuda_status();
bool tp_set_deterministic(bool on);
char* tp_set_float32_matmul_precision(int to, int* before);
char* tp_float32_matmul_precision(int* now);
bool tp_rounds_f32_products();
char* tp_peak_memory(int device, int64_t* bytes);
char* tp_reset_peak_memory(int device);
const char* tp_libtorch_folder();
char* tp_cuda_stream(int device, void** stream);
struct tp_streams;
char* tp_streams_new(int device, tp_streams** streams);
void tp_streams_free(tp_streams* streams);
char* tp_streams_wait(tp_streams* streams, bool side);
char* tp_streams_use(tp_streams* streams, bool side);
}
