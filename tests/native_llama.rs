//! The Llama of the examples against `transformers`, its adapters against PEFT,
//! and the memory that loading it takes.

mod common;

#[path = "../examples/llama/mod.rs"]
mod llama;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use common::{assert_close, assert_differs, peer, read, rng};
use llama::Llama;
use llama::cache::{Cache, Part};
use tch::nn::Module;
use tch::{Device, Kind, Tensor, nn};
use tch_peft::{Base, Error, LoraConfig, LoraModel, QuantConfig, QuantizeOptions};

const MODELS: [&str; 9] = [
    "llama",
    "llama_long",
    "llama_linear",
    "mistral",
    "mistral_full",
    "qwen2",
    "qwen2_twice",
    "qwen2_sliding",
    "qwen3",
];
const TARGETS: [&str; 7] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

/// The models of the peer, made once.
fn models() -> Option<&'static Path> {
    common::made("native_llama", "native_llama.py", &["make"])
}

fn load(folder: &Path, quantize: Option<&QuantConfig>) -> Base<Llama> {
    llama::load(folder, Device::Cpu, Kind::Float, quantize, QuantizeOptions::new()).unwrap()
}

#[test]
fn logits_are_those_of_transformers() {
    let Some(dir) = models() else { return };
    for name in MODELS {
        let record = read(dir.join(name).join("record.safetensors"));
        let base = load(&dir.join(name), None);
        let logits = tch::no_grad(|| base.module().forward(&record["tokens"]));
        assert_close(name, &logits, &record["logits"], 1e-5);
    }
}

/// Texts that grow by pieces of other lengths, in batches with other texts, see what
/// they would see as a whole.
#[test]
fn kept_keys_and_values_are_as_good_as_the_whole_text() {
    let Some(dir) = models() else { return };
    let lengths = [[7, 1, 12], [1, 1, 1], [9, 0, 1], [1, 21, 1], [6, 1, 9]];
    for name in MODELS {
        let record = read(dir.join(name).join("record.safetensors"));
        let base = load(&dir.join(name), None);
        let config = llama::Config::read(&dir.join(name)).unwrap();
        let texts = Vec::<Vec<i64>>::try_from(&record["tokens"]).unwrap();
        let _no_grad = tch::no_grad_guard();
        let mut caches: Vec<_> =
            texts.iter().map(|text| Cache::new(&config, text.len(), Kind::Float, Device::Cpu)).collect();
        let mut found: [Vec<Tensor>; 3] = Default::default();
        for lengths in lengths {
            let mut parts = Vec::new();
            let next = texts.iter().zip(&mut caches).zip(lengths);
            for ((text, cache), length) in next.filter(|(_, length)| *length > 0) {
                let from = cache.length() as usize;
                parts.push(Part { tokens: &text[from..from + length], cache });
            }
            let logits = base.module().logits(&base.module().extend(&mut parts));
            let mut from = 0;
            for (found, length) in found.iter_mut().zip(lengths) {
                found.push(logits.narrow(0, from, length as i64));
                from += length as i64;
            }
        }
        for (n, found) in found.iter().enumerate() {
            assert_close(&format!("{name} {n}"), &Tensor::cat(found, 0), &record["logits"].get(n as i64), 1e-5);
        }
    }
}

/// Quantised on the way is as loaded and then quantised, also where embeddings are tied.
#[test]
fn loading_and_quantising_is_quantising_what_was_loaded() {
    let Some(dir) = models() else { return };
    let schemes = [
        QuantConfig::nf4().double_quant(true).skip(["lm_head"]),
        QuantConfig::int8().embeddings(true),
        QuantConfig::int4().skip(["layers.1.mlp.*"]),
    ];
    for name in ["qwen2", "qwen2_twice", "qwen3"] {
        for config in schemes.clone() {
            let config = config.build().unwrap();
            let folder = dir.join(name);
            let mut told = Vec::new();
            let options = QuantizeOptions::new().progress(|p| told.push((p.weight.name.clone(), p.done, p.total)));
            let base = llama::load(&folder, Device::Cpu, Kind::Float, Some(&config), options).unwrap();
            let expected = load(&folder, None).quantize(&config).unwrap();
            assert_eq!(base.fingerprint().unwrap(), expected.fingerprint().unwrap(), "{name} {config:?}");
            let bytes = [&base, &expected].map(|base| base.quantization_report().bytes_after());
            assert_eq!(bytes[0], bytes[1]);
            if name != "qwen2" {
                // Its tied weight was packed under the one name that the files have.
                assert_eq!(base.quantization_report(), expected.quantization_report());
            }
            let names: Vec<_> = base.quantization_report().weights().iter().map(|w| w.name.clone()).collect();
            let all = names.len();
            assert_eq!(told, names.into_iter().enumerate().map(|(i, n)| (n, i + 1, all)).collect::<Vec<_>>());
        }
    }
}

#[test]
fn what_is_wrong_with_the_files_is_told() {
    let Some(dir) = models() else { return };
    let folder = dir.join("llama");
    let config = QuantConfig::int8().build().unwrap();
    let attempt = |folder: &Path, quantize: Option<&QuantConfig>| {
        llama::load(folder, Device::Cpu, Kind::Float, quantize, QuantizeOptions::new()).unwrap_err()
    };
    let typed = |error: Box<dyn std::error::Error>| *error.downcast::<Error>().unwrap();

    // Packed already: loaded as it is, but not packed once more.
    let packed = common::fresh_dir("native_llama_packed");
    let base = load(&folder, Some(&config));
    base.save_quantized(&packed).unwrap();
    fs::copy(folder.join("config.json"), packed.join("config.json")).unwrap();
    assert!(matches!(typed(attempt(&packed, Some(&config))), Error::AlreadyQuantized { .. }));
    assert_eq!(load(&packed, None).fingerprint().unwrap(), base.fingerprint().unwrap());

    let nowhere = QuantConfig::int8().skip(["no_proj"]).build().unwrap();
    assert!(matches!(typed(attempt(&folder, Some(&nowhere))), Error::NoTarget { .. }));

    // Another model's configuration: other weights, and other shapes.
    let changed = common::fresh_dir("native_llama_changed");
    for file in fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).filter(|path| path.is_file()) {
        fs::copy(&file, changed.join(file.file_name().unwrap())).unwrap();
    }
    let text = fs::read_to_string(folder.join("config.json")).unwrap();
    let change = |from: &str, to: &str| {
        assert!(text.contains(from), "no {from}");
        fs::write(changed.join("config.json"), text.replace(from, to)).unwrap();
    };
    change("\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4");
    let Error::Keys { missing, .. } = typed(attempt(&changed, Some(&config))) else { panic!() };
    assert!(missing.contains(&"model.layers.3.mlp.up_proj.weight".to_string()), "{missing:?}");
    change("\"intermediate_size\": 56", "\"intermediate_size\": 48");
    assert!(matches!(typed(attempt(&changed, Some(&config))), Error::Mismatch { .. }));

    // Values that are tied in the module but differ in the file.
    let tied = common::fresh_dir("native_llama_tied");
    let mut tensors = read(dir.join("qwen2_twice/model.safetensors"));
    let _ = tensors.get_mut("lm_head.weight").unwrap().get(3).fill_(0.5);
    common::write(tied.join("model.safetensors"), &tensors.into_iter().collect::<Vec<_>>());
    fs::copy(dir.join("qwen2/config.json"), tied.join("config.json")).unwrap();
    for quantize in [None, Some(&config)] {
        assert!(matches!(typed(attempt(&tied, quantize)), Error::Mismatch { .. }));
    }

    // What the model doesn't do is refused by name.
    for (from, to, name) in [
        ("\"silu\"", "\"gelu\"", "hidden_act"),
        ("\"rope_type\": \"default\"", "\"rope_type\": \"yarn\"", "rope_type"),
        ("\"attention_dropout\": 0.0", "\"attention_dropout\": 0.1", "attention_dropout"),
        ("\"model_type\": \"llama\"", "\"model_type\": \"gemma\"", "gemma"),
    ] {
        change(from, to);
        let error = attempt(&changed, None).to_string();
        assert!(error.contains(name) && error.contains("config.json"), "{error}");
    }
}

#[test]
fn adapters_are_exchanged_with_peft() {
    let Some(dir) = models() else { return };
    let folder = dir.join("llama");
    let record = read(folder.join("record.safetensors"));
    let theirs = LoraModel::from_pretrained(load(&folder, None), folder.join("adapter")).unwrap();
    let logits = tch::no_grad(|| theirs.forward(&record["tokens"])).unwrap();
    assert_close("PEFT's adapter", &logits, &record["adapted"], 1e-5);

    let _rng = rng();
    tch::manual_seed(5);
    let config = LoraConfig::builder().r(3).lora_alpha(6.0).target_modules(TARGETS).build().unwrap();
    let mut ours = LoraModel::wrap(load(&folder, None), config).unwrap();
    for parameter in ours.trainable_parameters() {
        let mut tensor = parameter.tensor.shallow_clone();
        tch::no_grad(|| tensor.copy_(&(Tensor::randn_like(&tensor) * 0.1)));
    }
    ours.save_pretrained(folder.join("ours")).unwrap();
    let keys = read(folder.join("ours/adapter_model.safetensors"));
    assert!(keys.contains_key("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"));
    assert_eq!(keys.len(), 3 * TARGETS.len() * 2);
    ours.eval().unwrap();
    let logits = tch::no_grad(|| ours.forward(&record["tokens"])).unwrap();
    assert_differs("our adapter", &logits, &record["logits"], 0.05);
    common::write(folder.join("ours.safetensors"), &[("logits".into(), logits)]);
    peer("native_llama.py", &["check".as_ref(), dir.as_os_str()]);
}

/// 64 million weights.
const CONFIG: &str = r#"{
    "model_type": "llama", "vocab_size": 512, "hidden_size": 1024, "intermediate_size": 4096,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4
}"#;
/// The largest weight as it is in the file and as the model has it, bf16 and f32, in MB.
const LARGEST: f64 = 4096.0 * 1024.0 * (2.0 + 4.0) / 1e6;

/// A value of `/proc/self/status`, in MB.
fn status(field: &str) -> f64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() * 1024.0 / 1e6
}

/// Random weights in bf16, a shard for each layer. Answers their dense size in f32, in MB.
fn write_model(folder: &Path) -> f64 {
    fs::write(folder.join("config.json"), CONFIG).unwrap();
    let store = nn::VarStore::new(Device::Cpu);
    llama::Llama::new(&store.root(), Kind::BFloat16, &llama::Config::read(folder).unwrap());
    let (mut map, mut elements) = (serde_json::Map::new(), 0);
    let variables = store.variables();
    let shard_of = |name: &str| format!("model-{}.safetensors", name.split('.').nth(2).unwrap_or("other"));
    let shards: BTreeSet<String> = variables.keys().map(|name| shard_of(name)).collect();
    for shard in shards {
        let mut tensors = Vec::new();
        for (name, place) in variables.iter().filter(|(name, _)| shard_of(name) == shard) {
            tensors.push((name.clone(), Tensor::randn(place.size(), (Kind::BFloat16, Device::Cpu))));
            map.insert(name.clone(), shard.clone().into());
            elements += place.numel();
        }
        common::write(folder.join(&shard), &tensors);
    }
    let index = serde_json::json!({ "metadata": {}, "weight_map": map });
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    elements as f64 * 4.0 / 1e6
}

/// Not a test: loads the model of the environment in a process of its own, and
/// tells the bytes packed and the peak, in MB.
#[test]
#[ignore = "a process for the test below"]
fn load_and_measure() {
    let Some(folder) = std::env::var_os("NATIVE_LLAMA_FOLDER") else { return };
    let config = match std::env::var("NATIVE_LLAMA_SCHEME").unwrap().as_str() {
        "int8" => QuantConfig::int8(),
        _ => QuantConfig::nf4().double_quant(true),
    };
    // What the libraries need from the first tensor on.
    let _ = Tensor::randn([8, 8], (Kind::Float, Device::Cpu)).matmul(&Tensor::ones([8, 8], (Kind::Float, Device::Cpu)));
    let before = status("VmRSS");
    let base = load(Path::new(&folder), Some(&config.build().unwrap()));
    let packed = base.quantization_report().bytes_after() as f64 / 1e6;
    println!("measured {packed} {}", status("VmHWM") - before);
}

/// The peak of a fresh process, over what it had at first.
#[test]
fn the_dense_model_is_never_in_memory() {
    let folder = common::fresh_dir("native_llama_memory");
    let _rng = rng();
    let dense = write_model(&folder);
    for scheme in ["int8", "nf4"] {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "load_and_measure", "--ignored", "--nocapture"]);
        let output = command.env("NATIVE_LLAMA_FOLDER", &folder).env("NATIVE_LLAMA_SCHEME", scheme).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let (_, measured) = text.split_once("measured ").unwrap_or_else(|| panic!("{text}"));
        let numbers: Vec<f64> = measured.split_whitespace().take(2).map(|n| n.parse().unwrap()).collect();
        let (packed, peak) = (numbers[0], numbers[1]);
        println!("{scheme}: {dense:.0} MB dense, {packed:.0} MB packed, {peak:.0} MB at most");
        // Beside the packed weights: one weight at a time, the embeddings and
        // norms (4 MB), and what packing takes for itself.
        assert!(peak < packed + 2.0 * LARGEST, "{scheme}: {packed:.0} MB packed, {peak:.0} MB at most");
        assert!(peak < dense / 2.0, "{scheme}: {dense:.0} MB dense, {peak:.0} MB at most");
    }
    fs::remove_dir_all(&folder).unwrap();
}
