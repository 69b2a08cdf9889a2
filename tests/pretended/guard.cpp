// What torch's C++ asks of an accelerator that is not there: which device a thread is at, and whether backward passes need streams.
//
// Loaded before torch, whose own two functions below are then never called: to autograd a pretended device is no accelerator, so it keeps
// no streams for it.
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <optional>

namespace {

thread_local c10::DeviceIndex current = 0;  // as CUDA has it: every new thread begins at the first device

template <c10::DeviceType D>
struct Guard final : c10::impl::NoOpDeviceGuardImpl<D> {
  c10::DeviceIndex deviceCount() const noexcept override { return 0; }  // none for which autograd would start threads
  c10::Device getDevice() const override { return c10::Device(D, current); }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.index() >= 0) current = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before(D, current);
    uncheckedSetDevice(device);
    return before;
  }
};

template <c10::DeviceType D>
void install() {
  static Guard<D> guard;
  c10::impl::device_guard_impl_registry[static_cast<size_t>(D)].store(&guard);
}

}  // namespace

#define NO_ACCELERATOR                                                        \
  std::optional<c10::DeviceType> getAccelerator(bool) { return std::nullopt; } \
  bool isAccelerator(c10::DeviceType) { return false; }

namespace at {
NO_ACCELERATOR  // where torch had them before 2.14
namespace accelerator {
NO_ACCELERATOR
}
}  // namespace at

extern "C" {
void install_guards() {
  install<c10::DeviceType::CUDA>();
  install<c10::DeviceType::MPS>();
}
int current_device() { return current; }
void set_current_device(int index) { current = static_cast<c10::DeviceIndex>(index); }
}
