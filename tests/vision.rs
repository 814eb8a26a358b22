//! Models of `tch::vision`, unmodified: the final linear of a ResNet and the attention of DINOv2
//! run adapted, dense and quantised, and have the gradients of W + s·B·A written out densely.

mod common;

use common::{assert_close, assert_differs, assert_same, bits, device, rng};
use tch::nn::{self, ModuleT};
use tch::vision::dinov2::DinoVisionTransformer;
use tch::vision::resnet;
use tch::{Device, Kind, Tensor};
use tch_peft::quant::quantize;
use tch_peft::{AdamW, Base, ForwardModule, LoraConfig, LoraModel, NamedParameter, Optimizer, QuantConfig};

/// f32, relative to the norm.
const TOLERANCE: f64 = 1e-5;
fn floats() -> (Kind, Device) {
    (Kind::Float, device())
}
const CLASSES: i64 = 10;

fn schemes() -> [Option<QuantConfig>; 4] {
    let nf4 = QuantConfig::nf4;
    [
        None,
        Some(QuantConfig::int8().build().unwrap()),
        Some(nf4().build().unwrap()),
        Some(nf4().double_quant(true).build().unwrap()),
    ]
}

fn label(config: &Option<QuantConfig>) -> String {
    config.as_ref().map_or("dense".into(), |c| c.scheme().to_string())
}

/// The values that the base computes with, once it is quantised.
fn effective(name: &str, weight: &Tensor, config: &Option<QuantConfig>) -> Tensor {
    match config {
        None => weight.copy(),
        Some(config) => quantize(name, weight, config.scheme()).unwrap().dequantize(Kind::Float).unwrap(),
    }
}

fn randomise(parameters: &[NamedParameter]) {
    let _no_grad = tch::no_grad_guard();
    for p in parameters {
        let _ = p.tensor.shallow_clone().normal_(0.0, 0.2);
    }
}

/// A and B of a layer.
fn factors<M>(model: &LoraModel<M>, layer: &str) -> [Tensor; 2] {
    ["lora_A", "lora_B"].map(|half| {
        let name = format!("base_model.model.{layer}.{half}.weight");
        model.parameters().into_iter().find(|p| p.name == name).unwrap_or_else(|| panic!("no {name}")).tensor
    })
}

/// Copies values from one store to another of the same names.
fn copy(from: &nn::VarStore, to: &nn::VarStore) {
    let _no_grad = tch::no_grad_guard();
    let from = from.variables();
    for (name, mut tensor) in to.variables() {
        tensor.copy_(&from[&name]);
    }
}

fn descends<M: ForwardModule>(what: &str, model: &LoraModel<M>, images: &Tensor, labels: &Tensor) {
    let mut optimizer = AdamW::builder().lr(1e-2).build(model.trainable_parameters()).unwrap();
    let mut losses = Vec::new();
    for _ in 0..12 {
        let loss = model.forward(images).unwrap().cross_entropy_for_logits(labels);
        losses.push(f64::try_from(&loss).unwrap());
        loss.backward();
        optimizer.step().unwrap();
        optimizer.zero_grad().unwrap();
    }
    let (first, last) = (losses[0], losses[losses.len() - 1]);
    assert!(last < 0.7 * first, "{what}: the loss went from {first} to {last}");
}

#[test]
fn the_final_linear_of_a_resnet() {
    let _rng = rng();
    tch::manual_seed(1);
    let images = Tensor::randn([4, 3, 64, 64], floats());
    let labels = Tensor::from_slice(&[1i64, 7, 3, 3]).to_device(device());
    let start = nn::VarStore::new(device());
    let plain = resnet::resnet18(&start.root(), CLASSES);
    let mut frozen = nn::VarStore::new(device());
    let features = resnet::resnet18_no_final_layer(&frozen.root());
    copy(&start, &frozen);
    frozen.freeze();
    let features = features.forward_t(&images, false);
    let expected_base = plain.forward_t(&images, false).detach();

    for scheme in schemes() {
        let label_ = label(&scheme);
        let vs = nn::VarStore::new(device());
        let net = resnet::resnet18(&vs.root(), CLASSES);
        copy(&start, &vs);
        let mut base = Base::new(vs, net);
        if let Some(config) = &scheme {
            base = base.quantize(config).unwrap();
            let report = base.quantization_report();
            let names: Vec<&str> = report.weights().iter().map(|w| w.name.as_str()).collect();
            assert_eq!(names, ["fc.weight"], "convolutions and norms stay dense");
        }
        let config = LoraConfig::builder().r(4).lora_alpha(6.0).target_modules(["fc"]).build().unwrap();
        let mut model = LoraModel::wrap(base, config).unwrap();
        model.eval().unwrap();

        let w = effective("fc.weight", &start.variables()["fc.weight"].detach(), &scheme);
        let bias = start.variables()["fc.bias"].detach();
        let base_output = features.matmul(&w.tr()) + &bias;
        assert_close(&label_, &model.forward(&images).unwrap(), &base_output, TOLERANCE);
        if scheme.is_none() {
            assert_close("dense, at the start", &model.forward(&images).unwrap(), &expected_base, 1e-6);
        }

        randomise(&model.trainable_parameters());
        let [a, b] = factors(&model, "fc");
        let [by_hand_a, by_hand_b] = [&a, &b].map(|t| t.detach().copy().set_requires_grad(true));
        let adapted = model.forward(&images).unwrap();
        let by_hand = features.matmul(&(&w + by_hand_b.matmul(&by_hand_a) * (6.0 / 4.0)).tr()) + &bias;
        assert_close(&label_, &adapted, &by_hand, TOLERANCE);
        assert_differs(&label_, &adapted, &base_output, 0.1);

        adapted.cross_entropy_for_logits(&labels).backward();
        by_hand.cross_entropy_for_logits(&labels).backward();
        assert_close(&format!("{label_}: gradient of A"), &a.grad(), &by_hand_a.grad(), TOLERANCE);
        assert_close(&format!("{label_}: gradient of B"), &b.grad(), &by_hand_b.grad(), TOLERANCE);

        model.train().unwrap();
        descends(&label_, &model, &images, &labels);
    }
}

/// A small DINOv2. What tch starts at zero (layer scales, class token, positions) is drawn too, or
/// the attention would not show in the output.
fn dino(vs: &nn::VarStore, seed: i64) -> DinoVisionTransformer {
    let net = DinoVisionTransformer::new(&vs.root(), 2, 32, 4);
    let _no_grad = tch::no_grad_guard();
    tch::manual_seed(seed);
    let mut variables: Vec<(String, Tensor)> = vs.variables().into_iter().collect();
    variables.sort_by(|a, b| a.0.cmp(&b.0));
    for (name, mut tensor) in variables {
        let _ = match name.rsplit('.').next().unwrap() {
            "gamma" => tensor.fill_(0.7),
            "cls_token" | "pos_embed" => tensor.normal_(0.0, 0.5),
            _ => continue,
        };
    }
    net
}

#[test]
fn the_attention_of_dinov2() {
    let _rng = rng();
    tch::manual_seed(2);
    let images = Tensor::randn([3, 3, 28, 42], floats());
    let labels = Tensor::from_slice(&[10i64, 700, 33]).to_device(device());
    let start = nn::VarStore::new(device());
    let plain = dino(&start, 5);
    let expected_base = plain.forward_t(&images, false).detach();
    let scaling = 8.0 / 4.0;

    for scheme in schemes() {
        let label_ = label(&scheme);
        let vs = nn::VarStore::new(device());
        let net = dino(&vs, 5);
        copy(&start, &vs);
        let mut base = Base::new(vs, net);
        if let Some(config) = &scheme {
            base = base.quantize(config).unwrap();
            let chosen = base.quantization_report().weights();
            assert!(chosen.iter().any(|w| w.name == "blocks.0.attn.qkv.weight"));
            assert!(chosen.iter().all(|w| !w.name.contains("embed") && !w.name.contains("norm")));
        }
        let quantised: Vec<String> = base.quantization_report().weights().iter().map(|w| w.name.clone()).collect();
        let config =
            LoraConfig::builder().r(4).lora_alpha(8.0).target_modules(["attn.qkv", "attn.proj"]).build().unwrap();
        let model = LoraModel::wrap(base, config).unwrap();
        assert_eq!(
            model.layers(),
            ["blocks.0.attn.proj", "blocks.0.attn.qkv", "blocks.1.attn.proj", "blocks.1.attn.qkv"]
        );
        let at_first = model.forward(&images).unwrap();
        if scheme.is_none() {
            assert_close("at the start", &at_first, &expected_base, 1e-6);
        }
        randomise(&model.trainable_parameters());

        // The same network without adapters, whose weights are W + s·B·A.
        let twin_vs = nn::VarStore::new(device());
        let twin = dino(&twin_vs, 5);
        copy(&start, &twin_vs);
        {
            let _no_grad = tch::no_grad_guard();
            for (name, mut tensor) in twin_vs.variables() {
                if quantised.contains(&name) {
                    tensor.copy_(&effective(&name, &tensor.detach(), &scheme));
                }
            }
            assert_close(&label_, &at_first, &twin.forward_t(&images, false), TOLERANCE);
            for layer in model.layers() {
                let [a, b] = factors(&model, layer);
                let mut weight = twin_vs.variables()[&format!("{layer}.weight")].shallow_clone();
                weight += b.matmul(&a) * scaling;
            }
        }
        let (found, expected) = (model.forward(&images).unwrap(), twin.forward_t(&images, false));
        assert_close(&label_, &found, &expected, TOLERANCE);
        assert_differs(&label_, &found, &at_first, 1e-2);

        found.cross_entropy_for_logits(&labels).backward();
        expected.cross_entropy_for_logits(&labels).backward();
        for layer in model.layers() {
            let [a, b] = factors(&model, layer);
            let dw = twin_vs.variables()[&format!("{layer}.weight")].grad();
            let (expected_a, expected_b) =
                (b.detach().tr().matmul(&dw) * scaling, dw.matmul(&a.detach().tr()) * scaling);
            assert_close(&format!("{label_}: gradient of {layer}'s A"), &a.grad(), &expected_a, TOLERANCE);
            assert_close(&format!("{label_}: gradient of {layer}'s B"), &b.grad(), &expected_b, TOLERANCE);
            let _ = (a.grad().zero_(), b.grad().zero_());
        }
        descends(&label_, &model, &images, &labels);
    }
}

/// Quantising a base before and after it is wrapped gives the same bits.
#[test]
fn quantising_before_and_after_wrapping_is_the_same() {
    let _rng = rng();
    let images = Tensor::randn([2, 3, 28, 28], floats());
    let labels = Tensor::from_slice(&[10i64, 700]).to_device(device());
    let config = LoraConfig::builder().r(4).target_modules("all-linear").build().unwrap();
    for scheme in schemes().into_iter().flatten() {
        let [before, after] = [true, false].map(|first| {
            let vs = nn::VarStore::new(device());
            // Seeds the generator: both draw the same weights, and then the same adapters.
            tch::manual_seed(8);
            let net = dino(&vs, 5);
            let mut base = Base::new(vs, net);
            if first {
                base = base.quantize(&scheme).unwrap();
            }
            let mut model = LoraModel::wrap(base, config.clone()).unwrap();
            randomise(&model.trainable_parameters());
            if !first {
                model.quantize(&scheme).unwrap();
            }
            let output = model.forward(&images).unwrap();
            output.cross_entropy_for_logits(&labels).backward();
            let mut all = vec![("output".to_string(), output.detach())];
            all.extend(model.trainable_parameters().into_iter().map(|p| (p.name, p.tensor.grad())));
            (all, model.base().fingerprint().unwrap())
        });
        assert_eq!(before.1, after.1, "{}", scheme.scheme());
        for ((name, a), (_, b)) in before.0.iter().zip(&after.0) {
            assert_same(&format!("{}: {name}", scheme.scheme()), a, b);
            assert!(a.numel() > 0 && bits(a).iter().any(|byte| *byte != 0), "{name} is zero");
        }
    }
}
