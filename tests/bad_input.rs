//! Bad input: a typed error each, and nothing changed.

mod common;

use common::{assert_same, bits, fresh_dir, rng};
use safetensors::tensor::{Dtype, TensorView};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::nn::{self, Module};
use tch::{Device, Kind, Tensor};
use tch_peft::{Base, Error, LoraConfig, LoraConfigBuilder, LoraModel, QuantConfig};

const CPU: (Kind, Device) = (Kind::Float, Device::Cpu);

#[derive(Debug)]
struct Net {
    q_proj: nn::Linear,
    v_proj: nn::Linear,
}

impl Module for Net {
    fn forward(&self, x: &Tensor) -> Tensor {
        x.apply(&self.q_proj).tanh() * x.apply(&self.v_proj)
    }
}

/// The network and a handle on its store's tensors.
fn net() -> (Base<Net>, BTreeMap<String, Tensor>) {
    tch::manual_seed(1);
    let vs = nn::VarStore::new(Device::Cpu);
    let linear = |name: &str| nn::linear(vs.root() / "h" / name, 16, 24, Default::default());
    let net = Net { q_proj: linear("q_proj"), v_proj: linear("v_proj") };
    let tensors = vs.variables().into_iter().collect();
    (Base::new(vs, net), tensors)
}

fn config() -> LoraConfigBuilder {
    LoraConfig::builder().r(2).target_modules(["q_proj", "v_proj"]).init_lora_weights(false)
}

/// The outputs of a base on a fixed input.
fn answer(module: &Net) -> Vec<u8> {
    bits(&module.forward(&(Tensor::arange(48, CPU).view([3, 16]) / 48.0)))
}

#[test]
fn values_out_of_range_are_named_by_their_field() {
    let field = |builder: LoraConfigBuilder| match builder.build() {
        Err(Error::Config { field, expected, found }) => {
            assert!(!expected.is_empty() && !found.is_empty());
            field
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(field(config().r(0)), "r");
    assert_eq!(field(config().r(-4)), "r");
    for p in [1.0, 1.5, -0.1, f64::NAN] {
        assert_eq!(field(config().lora_dropout(p)), "lora_dropout");
    }
    for alpha in [f64::NAN, f64::INFINITY] {
        assert_eq!(field(config().lora_alpha(alpha)), "lora_alpha");
    }
    assert_eq!(field(LoraConfig::builder()), "target_modules");
    assert_eq!(field(config().target_modules(Vec::<String>::new())), "target_modules");
    assert_eq!(field(config().target_modules([""])), "target_modules");
    assert_eq!(field(config().target_modules("q_proj(")), "target_modules");
    assert!(matches!(QuantConfig::int8().double_quant(true).build(), Err(Error::Config { .. })));
}

#[test]
fn a_target_that_is_not_there_is_named_with_near_ones() {
    let _rng = rng();
    for (builder, wrong) in [
        (config().target_modules(["q_proj", "k_proj"]), "k_proj"),
        (config().target_modules(["qproj"]), "qproj"),
        (config().target_modules("q_proj"), "q_proj"),
    ] {
        let (base, tensors) = net();
        let error = LoraModel::wrap(base, builder.build().unwrap()).unwrap_err();
        let Error::NoTarget { target, near } = &error else { panic!("{error}") };
        assert_eq!(target, wrong);
        assert!(near.contains(&"h.q_proj".to_string()), "{near:?}");
        let q = &tensors["h.q_proj.weight"];
        assert!(q.requires_grad() && !q.data_ptr().is_null(), "frozen or adapted in spite of the error");
    }
    let (base, _) = net();
    let skip = QuantConfig::nf4().skip(["lm_head"]).build().unwrap();
    assert!(matches!(base.quantize(&skip), Err(Error::NoTarget { target, .. }) if target == "lm_head"));
}

#[test]
fn wrapping_twice_is_refused_and_the_first_adapter_stays() {
    let _rng = rng();
    let (base, _) = net();
    let model = LoraModel::wrap(base, config().build().unwrap()).unwrap();
    let parameters: Vec<_> = model.parameters().into_iter().map(|p| p.tensor).collect();
    let before = answer(model.module());
    // The same tensors in a second base.
    let second = nn::VarStore::new(Device::Cpu);
    for (name, layer) in [("q_proj", &model.module().q_proj), ("v_proj", &model.module().v_proj)] {
        drop((second.root() / "h" / name).add("weight", layer.ws.shallow_clone(), false));
    }
    let error = LoraModel::wrap(Base::new(second, ()), config().build().unwrap()).unwrap_err();
    assert!(matches!(&error, Error::AlreadyAdapted { name } if name == "h.q_proj.weight"), "{error}");
    assert_eq!(answer(model.module()), before);
    // The base itself, taken back with its adapters.
    let again = LoraModel::wrap(model.into_base(), config().build().unwrap()).unwrap_err();
    assert!(matches!(again, Error::AlreadyAdapted { .. }));
    assert!(parameters.iter().all(Tensor::requires_grad));
}

#[test]
fn quantising_twice_is_refused() {
    let _rng = rng();
    let (base, _) = net();
    let mut model =
        LoraModel::wrap(base.quantize(&QuantConfig::nf4().build().unwrap()).unwrap(), config().build().unwrap())
            .unwrap();
    let before = answer(model.module());
    let error = model.quantize(&QuantConfig::int8().build().unwrap()).unwrap_err();
    assert!(matches!(&error, Error::AlreadyQuantized { scheme, .. } if scheme == "nf4"), "{error}");
    assert_eq!(answer(model.module()), before);
}

#[test]
fn a_weight_that_is_not_finite_is_refused_by_name_before_any_is_touched() {
    let _rng = rng();
    for value in [f64::NAN, f64::INFINITY] {
        let (base, tensors) = net();
        tch::no_grad(|| drop(tensors["h.v_proj.weight"].get(3).f_fill_(value).unwrap()));
        let error = base.quantize(&QuantConfig::int8().build().unwrap()).unwrap_err();
        assert!(matches!(&error, Error::NotFinite { name, .. } if name == "h.v_proj.weight"), "{error}");
        assert!(tensors["h.q_proj.weight"].requires_grad(), "the first weight was touched");
        assert!(!tensors["h.q_proj.weight"].data_ptr().is_null());
    }
}

/// A good adapter, to be spoilt.
fn adapter(name: &str) -> PathBuf {
    let folder = fresh_dir(name);
    let (base, _) = net();
    LoraModel::wrap(base, config().build().unwrap()).unwrap().save_pretrained(&folder).unwrap();
    folder
}

/// Loading fails, and the base answers as before.
fn refused(folder: &Path) -> Error {
    let (base, tensors) = net();
    let before = answer(base.module());
    let weights: Vec<_> = tensors.values().map(Tensor::shallow_clone).collect();
    let error = LoraModel::from_pretrained(base, folder).expect_err("it must be refused");
    // The store's tensors are the module's own.
    let module = Net {
        q_proj: nn::Linear { ws: weights[1].shallow_clone(), bs: Some(weights[0].shallow_clone()) },
        v_proj: nn::Linear { ws: weights[3].shallow_clone(), bs: Some(weights[2].shallow_clone()) },
    };
    assert_eq!(answer(&module), before, "{error}");
    error
}

type Named = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// Rewrites the tensors of an adapter.
fn rewrite(folder: &Path, change: impl FnOnce(&mut Named)) {
    let path = folder.join("adapter_model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let mut named: Named =
        file.tensors().into_iter().map(|(n, v)| (n, (v.dtype(), v.shape().to_vec(), v.data().to_vec()))).collect();
    change(&mut named);
    let views = named.iter().map(|(n, (d, s, b))| (n, TensorView::new(*d, s.clone(), b).unwrap()));
    std::fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
}

const A: &str = "base_model.model.h.q_proj.lora_A.weight";
const B: &str = "base_model.model.h.q_proj.lora_B.weight";

#[test]
fn a_torn_adapter_is_refused_at_every_length() {
    let _rng = rng();
    let folder = adapter("bad-torn");
    let path = folder.join("adapter_model.safetensors");
    let whole = std::fs::read(&path).unwrap();
    let lengths = (0..16).chain((16..whole.len()).step_by(97)).chain([whole.len() - 1]);
    for length in lengths {
        std::fs::write(&path, &whole[..length]).unwrap();
        let error = refused(&folder);
        assert!(matches!(&error, Error::Corrupt { path: found, .. } if *found == path), "{length} bytes: {error}");
    }
    // A header that claims more than there is.
    for claim in [u64::MAX, 1 << 40, whole.len() as u64] {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&claim.to_le_bytes());
        std::fs::write(&path, &bytes).unwrap();
        assert!(matches!(refused(&folder), Error::Corrupt { .. }));
    }
}

#[test]
fn a_shuffled_adapter_is_refused() {
    let _rng = rng();
    // A and B exchanged: the keys are right, and the shapes are not.
    let folder = adapter("bad-shuffled");
    rewrite(&folder, |named| {
        let (a, b) = (named.remove(A).unwrap(), named.remove(B).unwrap());
        named.extend([(A.to_string(), b), (B.to_string(), a)]);
    });
    let error = refused(&folder);
    let Error::Mismatch { name, expected, found } = &error else { panic!("{error}") };
    assert_eq!((name.as_str(), expected.as_str()), (A, "floats [2, 16]"));
    assert!(found.contains("[24, 2]"), "{found}");

    // The tensors' places in the file exchanged in its header.
    let folder = adapter("bad-offsets");
    let path = folder.join("adapter_model.safetensors");
    let bytes = std::fs::read(&path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let mut header: serde_json::Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let offsets = [A, B].map(|key| header[key]["data_offsets"].clone());
    header[A]["data_offsets"] = offsets[1].clone();
    header[B]["data_offsets"] = offsets[0].clone();
    let mut text = serde_json::to_vec(&header).unwrap();
    text.resize(length, b' ');
    std::fs::write(&path, [&bytes[..8], &text, &bytes[8 + length..]].concat()).unwrap();
    assert!(matches!(refused(&folder), Error::Corrupt { .. }));
}

#[test]
fn wrong_shapes_dtypes_and_keys_are_refused_by_name() {
    let _rng = rng();
    let folder = adapter("bad-rank");
    // Another rank than the configuration's: one row would broadcast.
    rewrite(&folder, |named| drop(named.insert(A.into(), (Dtype::F32, vec![1, 16], vec![0; 64]))));
    assert!(matches!(refused(&folder), Error::Mismatch { name, .. } if name == A));
    let folder = adapter("bad-dtype");
    rewrite(&folder, |named| drop(named.insert(A.into(), (Dtype::I32, vec![2, 16], vec![0; 128]))));
    assert!(matches!(refused(&folder), Error::Mismatch { name, .. } if name == A));
    let folder = adapter("bad-keys");
    rewrite(&folder, |named| {
        let a = named.remove(A).unwrap();
        named.insert("base_model.model.h.k_proj.lora_A.weight".into(), a);
    });
    let error = refused(&folder);
    let Error::Keys { missing, unexpected, .. } = &error else { panic!("{error}") };
    assert_eq!((missing[0].as_str(), unexpected[0].as_str()), (A, "base_model.model.h.k_proj.lora_A.weight"));
}

#[test]
fn an_adapter_that_is_not_finite_is_refused_by_name() {
    let _rng = rng();
    for value in [f32::NAN, f32::NEG_INFINITY] {
        let folder = adapter("bad-nan");
        rewrite(&folder, |named| {
            let (_, _, bytes) = named.get_mut(B).unwrap();
            bytes[20..24].copy_from_slice(&value.to_le_bytes());
        });
        assert!(matches!(refused(&folder), Error::NotFinite { name, .. } if name == B));
    }
}

#[test]
fn missing_files_are_named() {
    let _rng = rng();
    for file in ["adapter_model.safetensors", "adapter_config.json"] {
        let folder = adapter("bad-missing");
        std::fs::remove_file(folder.join(file)).unwrap();
        let error = refused(&folder);
        assert!(matches!(&error, Error::Io { path, .. } if *path == folder.join(file)), "{error}");
    }
    let folder = adapter("bad-config");
    std::fs::write(folder.join("adapter_config.json"), "{\"r\": ").unwrap();
    assert!(matches!(refused(&folder), Error::Corrupt { .. }));
    assert!(matches!(Base::torchscript("no/such/module.pt"), Err(Error::Io { .. })));
}

#[test]
fn a_folder_that_cannot_be_made_is_an_error_that_names_it() {
    let _rng = rng();
    let dir = fresh_dir("bad-folder");
    let file = dir.join("file");
    std::fs::write(&file, "in the way").unwrap();
    let (base, _) = net();
    let model = LoraModel::wrap(base, config().build().unwrap()).unwrap();
    let before: Vec<_> = model.parameters().into_iter().map(|p| p.tensor.copy()).collect();
    // A file where a folder should be stops even root.
    for folder in [file.clone(), file.join("below")] {
        let error = model.save_pretrained(&folder).unwrap_err();
        assert!(matches!(&error, Error::Io { path, .. } if *path == folder), "{error}");
    }
    assert_eq!(std::fs::read(&file).unwrap(), b"in the way");
    for (parameter, before) in model.parameters().iter().zip(&before) {
        assert_same(&parameter.name, &parameter.tensor, before);
    }
}
