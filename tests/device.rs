//! Training on another device than the CPU: nothing of a step comes back to the host.
mod common;

use tch::nn;
use tch::{Device, Kind, Tensor};
use tch_peft::{AdamW, Base, LoraConfig, LoraModel, Optimizer, QuantConfig};

#[test]
fn quick() {
    let device = common::device();
    eprintln!("{device:?}");
    let x = Tensor::randn([4, 8], (Kind::Float, device)).set_requires_grad(true);
    eprintln!("made");
    let w = Tensor::randn([8, 8], (Kind::Float, device));
    let y = x.mm(&w).relu();
    eprintln!("{:?} {}", y.device(), y.sum(Kind::Float).double_value(&[]));
    y.sum(Kind::Float).backward();
    eprintln!("{:?} {}", x.grad().device(), x.grad().to_device(Device::Cpu));
    eprintln!("{:?}", x.f_add(&Tensor::ones([4, 8], (Kind::Float, Device::Cpu))));
    let v = x.detach().view(-1).narrow(0, 3, 2);
    let _ = v.shallow_clone().fill_(7.0);
    eprintln!("{}", x.detach().get(0).to_device(Device::Cpu));
    tch::manual_seed(1);
    let a = Tensor::rand([3], (Kind::Float, device));
    let b = Tensor::rand([3], (Kind::Float, Device::Cpu));
    tch::manual_seed(1);
    let c = Tensor::rand([3], (Kind::Float, device));
    eprintln!("{} {} {}", a.to_device(Device::Cpu), b, c.to_device(Device::Cpu));
    let vs = nn::VarStore::new(device);
    let l = nn::linear(vs.root() / "l", 64, 64, Default::default());
    let base = Base::new(vs, l).quantize(&QuantConfig::nf4().build().unwrap()).unwrap();
    let model =
        LoraModel::wrap(base, LoraConfig::builder().r(4).lora_dropout(0.1).target_modules(["l"]).build().unwrap())
            .unwrap();
    let mut opt = AdamW::builder().build(model.trainable_parameters()).unwrap();
    for _ in 0..3 {
        let (a, b) = (tch::utils::version_cudart(), tch::utils::version_cudnn());
        let x = Tensor::randn([4, 64], (Kind::Float, device)).set_requires_grad(true);
        model.forward(&x).unwrap().sum(Kind::Float).backward();
        opt.step().unwrap();
        opt.zero_grad().unwrap();
        eprintln!("{} reads {} launches", tch::utils::version_cudart() - a, tch::utils::version_cudnn() - b);
    }
}
