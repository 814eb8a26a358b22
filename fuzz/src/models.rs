//! Models: packed weights in every layout, and dense ones in shards.

use super::{Target, contents};
use std::collections::BTreeMap;
use std::path::Path;
use tch::nn::{Init, VarStore};
use tch::{Device, Kind, Tensor};
use tch_peft::{Base, QuantConfig, Scheme};

pub const QUANTIZED: Target = Target {
    name: "quantized",
    files: &["model.safetensors", "model.safetensors.index.json", "quantization_map.json", "quantize_config.json"],
    seeds: quantized_seeds,
    open: |folder| {
        let vs = store();
        let weights = handles(&vs);
        Base::from(vs).load_quantized(folder).is_ok_and(|base| sound(folder, &base, &weights))
    },
};

pub const DENSE_SHARDS: Target = Target {
    name: "dense_shards",
    files: &["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"],
    seeds: dense_seeds,
    open: |folder| {
        let vs = store();
        let weights = handles(&vs);
        let config = QuantConfig::nf4().skip(["head"]).build().expect("a valid configuration");
        Base::from(vs).load_and_quantize(folder, &config).is_ok_and(|base| sound(folder, &base, &weights))
    },
};

const SHAPES: [(&str, [i64; 2]); 2] = [("fc", [16, 64]), ("head", [8, 32])];

fn store() -> VarStore {
    let vs = VarStore::new(Device::Cpu);
    for (name, shape) in SHAPES {
        let _ = (vs.root() / "h" / name).f_var("weight", &shape, Init::Const(0.0)).expect("a weight");
    }
    vs
}

/// Second handles on the weights, which the base shares.
fn handles(vs: &VarStore) -> BTreeMap<String, Tensor> {
    vs.variables().into_iter().collect()
}

fn filled() -> VarStore {
    let vs = store();
    for (i, (_, mut weight)) in handles(&vs).into_iter().enumerate() {
        let numbers = Tensor::arange(weight.numel() as i64, (Kind::Float, Device::Cpu));
        let values = (numbers * (12.9898 + i as f64)).sin() * 0.3;
        tch::no_grad(|| weight.copy_(&values.view_as(&weight)));
    }
    vs
}

/// Whether what was accepted is what it says, also when saved and loaded again.
fn sound(folder: &Path, base: &Base<()>, weights: &BTreeMap<String, Tensor>) -> bool {
    let values = |weights: &BTreeMap<String, Tensor>| -> Vec<Tensor> {
        weights.values().map(|weight| weight.detach() * 1.0).collect()
    };
    let found = values(weights);
    for ((name, shape), value) in SHAPES.iter().zip(&found) {
        assert_eq!(value.size(), shape, "{name}");
        assert!(i64::try_from(value.isnan().any()).is_ok_and(|any| any == 0), "{name} is NaN");
    }
    let saved = folder.join("saved");
    base.save_quantized(&saved).expect("saved again");
    let vs = store();
    let again = handles(&vs);
    Base::from(vs).load_quantized(&saved).expect("loaded again");
    for (one, other) in found.iter().zip(values(&again)) {
        assert!(one.to_kind(Kind::Double).equal(&other.to_kind(Kind::Double)), "other values when loaded again");
    }
    true
}

fn quantized_seeds(folder: &Path) -> Vec<Vec<Vec<u8>>> {
    let schemes = [
        Scheme::NF4,
        Scheme::NF4_DOUBLE,
        Scheme::FP4,
        Scheme::LlmInt8,
        Scheme::Int8,
        Scheme::INT4,
        Scheme::INT2,
        Scheme::FP8,
        Scheme::Mxfp4,
        Scheme::Bf16,
    ];
    let mut seeds = Vec::new();
    for scheme in schemes {
        let config = QuantConfig::builder(scheme).build().expect("a valid configuration");
        let base = Base::from(filled()).quantize(&config).expect("a quantised base");
        let path = folder.join(scheme.to_string());
        base.save_quantized(&path).expect("a saved base");
        let mut files = contents(&path, QUANTIZED.files);
        seeds.push(files.clone());
        // As the Python libraries leave it: without our index.
        if !matches!(scheme, Scheme::Mxfp4 | Scheme::Bf16) {
            files[1].clear();
            seeds.push(files);
        }
    }
    // GPTQ, with and without an order of its columns, and AWQ.
    for (method, ordered) in [("gptq", false), ("gptq", true), ("awq", false)] {
        let mut tensors: Vec<(String, Tensor)> = Vec::new();
        for (name, [out, inn]) in SHAPES {
            let integers = |sizes: [i64; 2]| {
                let numbers = Tensor::arange(sizes[0] * sizes[1], (Kind::Int64, Device::Cpu));
                (numbers * 0x9e37_79b9i64 + 12345).remainder(1 << 31).to_kind(Kind::Int).view(sizes)
            };
            let qweight = if method == "gptq" { [inn / 8, out] } else { [inn, out / 8] };
            let scales = Tensor::full([inn / 32, out], 0.01, (Kind::Half, Device::Cpu));
            tensors.push((format!("h.{name}.qweight"), integers(qweight)));
            tensors.push((format!("h.{name}.qzeros"), integers([inn / 32, out / 8])));
            tensors.push((format!("h.{name}.scales"), scales));
            if ordered {
                let group = Tensor::arange(inn, (Kind::Int, Device::Cpu)).divide_scalar_mode(32, "floor");
                tensors.push((format!("h.{name}.g_idx"), group));
            }
        }
        let path = folder.join("seed.safetensors");
        Tensor::write_safetensors(&tensors, &path).expect("a file");
        let config = format!(r#"{{"quant_method": "{method}", "bits": 4, "group_size": 32}}"#);
        let file = std::fs::read(&path).expect("a file");
        seeds.push(vec![file, Vec::new(), Vec::new(), config.into_bytes()]);
    }
    seeds
}

fn dense_seeds(folder: &Path) -> Vec<Vec<Vec<u8>>> {
    let mut seeds = Vec::new();
    for kind in [Kind::Float, Kind::BFloat16, Kind::Half] {
        let mut map = serde_json::Map::new();
        for ((name, weight), file) in handles(&filled()).into_iter().zip(DENSE_SHARDS.files) {
            Tensor::write_safetensors(&[(&name, weight.detach().to_kind(kind))], folder.join(file)).expect("a shard");
            map.insert(name, (*file).into());
        }
        let index = serde_json::json!({"metadata": {"total_size": 5120}, "weight_map": map});
        std::fs::write(folder.join(DENSE_SHARDS.files[2]), index.to_string()).expect("an index");
        seeds.push(contents(folder, DENSE_SHARDS.files));
    }
    seeds
}
