//! Memory of embeddings, convolutions and stacks of experts with packed weights; one test
//! alone in its binary, since others would be counted too. Linux only.

use std::fs;
use tch::{Device, Kind, Tensor, nn};
use tch_peft::{Base, QuantConfig, Scheme, WeightRole};

/// A value of `/proc/self/status`, in MB.
fn status(field: &str) -> f64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() * 1024.0 / 1e6
}

/// How far the peak rises over what is resident at first, in MB.
fn rise<R>(f: impl FnOnce() -> R) -> f64 {
    let before = status("VmRSS");
    // Makes the peak start again from here.
    fs::write("/proc/self/clear_refs", "5").unwrap();
    let result = f();
    let rise = status("VmHWM") - before;
    drop(result);
    rise
}

/// An embedding of rows of 1,024 values and a convolution of `channels` to as many, packed.
fn layers(rows: i64, channels: i64, scheme: Scheme) -> Base<(nn::Embedding, nn::Conv2D)> {
    let vs = nn::VarStore::new(Device::Cpu);
    let embedding = nn::embedding(vs.root() / "embed", rows, 1024, Default::default());
    let conv = nn::conv2d(vs.root() / "conv", channels, channels, 3, Default::default());
    let config = QuantConfig::builder(scheme).embeddings(true).convolutions(true).build().unwrap();
    Base::new(vs, (embedding, conv)).quantize(&config).unwrap()
}

/// A stack of 24 experts (width, width), packed.
fn stack(width: i64, scheme: Scheme) -> Base<Tensor> {
    let vs = nn::VarStore::new(Device::Cpu);
    let weight = (vs.root() / "experts").randn("weight", &[24, width, width], 0.0, 0.1);
    let config = QuantConfig::builder(scheme).rule("experts", scheme).build().unwrap();
    Base::new(vs, weight).declare("experts", WeightRole::Experts { is_transposed: true }).quantize(&config).unwrap()
}

#[test]
fn layers_unpack_what_they_use() {
    // In MB, in f32.
    let stack_size = 24.0 * 1024.0 * 1024.0 * 4.0 / 1e6;
    let (table, weight) = (32_000.0 * 1024.0 * 4.0 / 1e6, 1536.0 * 1536.0 * 9.0 * 4.0 / 1e6);
    for scheme in [Scheme::NF4_DOUBLE, Scheme::INT4, Scheme::Mxfp4] {
        let look_up = |base: &Base<(nn::Embedding, nn::Conv2D)>, rows| {
            let indices = Tensor::randint(rows, [2, 256], (Kind::Int64, Device::Cpu));
            rise(|| indices.apply(&base.module().0))
        };
        let step = |base: &Base<(nn::Embedding, nn::Conv2D)>, channels| {
            let x = Tensor::randn([1, channels, 8, 8], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            rise(|| x.apply(&base.module().1).sum(Kind::Float).backward())
        };
        let all_experts = |experts: &Base<Tensor>, width| {
            let x = Tensor::randn([24, 4, width], (Kind::Float, Device::Cpu)).set_requires_grad(true);
            rise(|| x.bmm(experts.module()).sum(Kind::Float).backward())
        };
        // What libtorch keeps for itself from the first call on.
        let small = layers(10, 16, scheme);
        let _ = (look_up(&small, 10), step(&small, 16), all_experts(&stack(16, scheme), 16));
        // Each is used once: memory that was freed would be used again unseen.
        let base = layers(32_000, 1536, scheme);
        let (rows, step) = (look_up(&base, 32_000), step(&base, 1536));
        let experts = all_experts(&stack(1024, scheme), 1024);
        println!(
            "{scheme}: {rows:.1} MB of {table:.0}, {step:.1} MB of {weight:.1}, {experts:.1} MB of {stack_size:.0}"
        );
        // The 512 rows are 2.1 MB.
        assert!(rows < 6.0, "{scheme}: {rows:.1} MB for 512 rows of a table of {table:.0} MB");
        // A tile is 4.2 MB, one for each thread that a pass runs on, and libtorch copies it to a layout of its own.
        assert!(step < weight / 3.0, "{scheme}: {step:.1} MB for a weight of {weight:.1} MB");
        // Not one expert is dense as a whole.
        assert!(experts < stack_size / 5.0, "{scheme}: {experts:.1} MB for a stack of {stack_size:.0} MB");
    }
}
