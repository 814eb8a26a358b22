//! Checkpoints of others, and ours with others.

use super::common::{assert_close, assert_differs, fresh_dir, peer, python, read, rng, write};
use super::toy::{Setup, Toy, dense_base, floats};
use tch::Tensor;
use tch_peft::{LoraModel, Run};

#[test]
fn peft_loads_a_checkpoint_as_it_is() {
    if python().is_none() {
        return;
    }
    let _rng = rng();
    let dir = fresh_dir("interop-peft");
    let mut toy = Toy::new(Setup { scheme: "dense", ..Setup::default() }, Run::builder(dir.join("run")).every(3));
    toy.start().unwrap();
    toy.train_to(3);
    std::fs::rename(dir.join("run/checkpoint-00000003"), dir.join("checkpoint")).unwrap();
    let base: Vec<_> = dense_base().0.variables().into_iter().collect();
    write(dir.join("base.safetensors"), &base);
    toy.model.eval().unwrap();
    let x = (Tensor::arange(4 * 32, floats()) * 0.7).sin().view([4, 32]);
    let y = toy.model.forward(&x).unwrap();
    write(dir.join("output.safetensors"), &[("x".into(), x), ("y".into(), y)]);
    peer("checkpoint_interop.py", &["load", dir.to_str().unwrap()]);
}

#[test]
fn the_adapter_of_a_trainer_checkpoint_is_taken_over() {
    if python().is_none() {
        return;
    }
    let _rng = rng();
    let dir = fresh_dir("interop-trainer");
    peer("checkpoint_interop.py", &["trainer", dir.to_str().unwrap()]);
    let checkpoint = dir.join("trainer/checkpoint-3");
    let expected = read(dir.join("output.safetensors"));
    let base = || {
        let (mut vs, net) = dense_base();
        vs.load(dir.join("base.safetensors")).unwrap();
        (vs, net)
    };
    let mut model = LoraModel::init_lora(base(), &checkpoint).unwrap();
    assert_eq!(model.trainable_parameters().len(), 4, "it is trained further");
    model.eval().unwrap();
    let y = model.forward(&expected["x"]).unwrap();
    assert_close("output", &y, &expected["y"], 1e-5);
    let _off = model.disable_adapters();
    assert_differs("without the adapter", &model.forward(&expected["x"]).unwrap(), &expected["y"], 1e-2);
    // Its folder is not one of ours, and isn't taken for one: the optimizer's
    // pickle is not read.
    let found = tch_peft::checkpoint::latest(dir.join("trainer")).unwrap();
    assert!(found.found.is_none() && found.skipped.is_empty());
}
