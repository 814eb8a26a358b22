//! Attention as `torch.nn.MultiheadAttention` has it, whose queries, keys and values come from one
//! fused `in_proj_weight`: against PEFT, in TorchScript and in plain tch.

mod common;

use common::{assert_close, device, follow, read, rng};
use tch::{Kind, Tensor, nn};
use tch_peft::{Base, Error, LoraConfig, LoraModel};

#[test]
fn attentions_follow_peft_and_peft_follows_us() {
    let (Some(dir), _rng) = (follow::make("attention", &["attention"]), rng()) else { return };
    follow::follow(&dir, "attention");
    follow::check(&dir);
}

/// The same by hand, on handles of a `VarStore`: what PyTorch's `_in_projection_packed` does.
#[derive(Debug)]
struct Attention {
    in_proj_weight: Tensor,
    in_proj_bias: Tensor,
    out_proj: nn::Linear,
}

impl Attention {
    fn new(vs: &nn::Path) -> Self {
        let normal = nn::Init::Randn { mean: 0.0, stdev: 0.2 };
        Attention {
            in_proj_weight: vs.var("in_proj_weight", &[3 * DIM, DIM], normal),
            in_proj_bias: vs.var("in_proj_bias", &[3 * DIM], normal),
            out_proj: nn::linear(vs / "out_proj", DIM, DIM, Default::default()),
        }
    }

    fn attend(&self, q: Tensor, k: Tensor, v: Tensor) -> Tensor {
        let heads = |t: Tensor| t.view([t.size()[0], -1, 4, DIM / 4]).transpose(1, 2);
        let (q, k, v) = (heads(q), heads(k), heads(v));
        let y = Tensor::scaled_dot_product_attention(&q, &k, &v, None::<Tensor>, 0.0, false, None, false);
        y.transpose(1, 2).flatten(2, -1).apply(&self.out_proj)
    }
}

impl nn::Module for Attention {
    fn forward(&self, x: &Tensor) -> Tensor {
        let packed = x.linear(&self.in_proj_weight, Some(&self.in_proj_bias)).chunk(3, -1);
        self.attend(packed[0].shallow_clone(), packed[1].shallow_clone(), packed[2].shallow_clone())
    }
}

const DIM: i64 = 64;

/// PEFT's file of an attention on a tch model with the same weights gives PEFT's outputs and gradients,
/// through the fused weight and through its chunks.
#[test]
fn a_tch_attention_follows_peft() {
    let (Some(dir), _rng) = (follow::make("attention_tch", &["attention_of_itself"]), rng()) else { return };
    let folder = dir.join("attention_of_itself-dense-float32");
    let record = read(folder.join("record.safetensors"));
    let vs = nn::VarStore::new(device());
    let net = nn::seq().add(Attention::new(&(vs.root() / "mha"))).add(nn::linear(
        vs.root() / "head",
        DIM,
        5,
        Default::default(),
    ));
    let module = tch::CModule::load(folder.join("model.pt")).unwrap();
    let weights: std::collections::BTreeMap<_, _> = module.named_parameters().unwrap().into_iter().collect();
    for (name, mut value) in vs.variables() {
        tch::no_grad(|| value.copy_(&weights[&name]));
    }
    let model = LoraModel::init_lora(Base::new(vs, net), folder.join("adapter")).unwrap();
    assert_eq!(model.layers(), ["mha", "mha.out_proj"]);
    let output = model.forward(&record["0.x"]).unwrap();
    assert_close("output", &output, &record["0.output"], 1e-5);
    output.mse_loss(&record["0.label"], tch::Reduction::Mean).backward();
    for p in model.trainable_parameters() {
        assert_close(&p.name, &p.tensor.grad(), &record[&format!("0.grad.{}", p.name)], 1e-5);
    }
}

/// Parts of the fused weight, as attention to other tensors takes them, are those of the dense value.
#[test]
fn parts_of_the_fused_weight() {
    let _rng = rng();
    let vs = nn::VarStore::new(device());
    let net = Attention::new(&(vs.root() / "mha"));
    let config = LoraConfig::builder().target_modules(["mha"]).init_lora_weights(false).build().unwrap();
    let model = LoraModel::wrap(Base::new(vs, ()), config).unwrap();
    let adapters: Vec<Tensor> = model.parameters().into_iter().map(|p| p.tensor).collect();
    let x = Tensor::randn([2, 7, DIM], (Kind::Float, device()));
    let parts = |w: &Tensor| w.chunk(3, 0).iter().map(|w| x.linear(w, None::<Tensor>)).collect::<Vec<_>>();
    let whole = x.linear(&net.in_proj_weight, None::<Tensor>);
    let split = Tensor::cat(&parts(&net.in_proj_weight), -1);
    assert_close("outputs", &split, &whole, 1e-5);
    // The first two are those of out_proj.
    let grads = |y: &Tensor| Tensor::run_backward(&[y.square().sum(Kind::Float)], &adapters[2..], false, false);
    for (found, expected) in grads(&split).iter().zip(&grads(&whole)) {
        assert_close("gradients", found, expected, 1e-5);
    }
}

#[test]
fn what_makes_no_sense_is_refused_by_name() {
    let _rng = rng();
    let wrap = |config: tch_peft::LoraConfigBuilder, separate: bool| {
        let vs = nn::VarStore::new(device());
        let mha = vs.root() / "mha";
        if separate {
            for name in ["q_proj_weight", "k_proj_weight", "v_proj_weight"] {
                let _ = mha.var(name, &[DIM, DIM], nn::Init::Const(0.5));
            }
            let _ = nn::linear(&mha / "out_proj", DIM, DIM, Default::default());
        } else {
            let _ = Attention::new(&mha);
        }
        LoraModel::wrap(Base::from(vs), config.target_modules(["mha"]).build().unwrap())
    };
    let config = LoraConfig::builder;
    assert!(wrap(config(), false).is_ok());
    for (config, separate, name) in [
        (config().use_dora(true), false, "use_dora"),
        (config().lora_bias(true), false, "lora_bias"),
        (config(), true, "target_modules"),
    ] {
        let error = wrap(config, separate).unwrap_err();
        assert!(matches!(&error, Error::Config { field, .. } if field == name), "{name}: {error}");
    }
    // `all-linear` means out_proj alone, as in PEFT, and a list may name it too.
    let all = |target: &[&str]| {
        let vs = nn::VarStore::new(device());
        let _ = Attention::new(&(vs.root() / "mha"));
        let config = config().target_modules(target.to_vec()).build().unwrap();
        LoraModel::wrap(Base::from(vs), config).unwrap().layers().iter().map(|s| s.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(all(&["out_proj"]), ["mha.out_proj"]);
    assert_eq!(all(&["mha", "out_proj"]), ["mha", "mha.out_proj"]);
}
