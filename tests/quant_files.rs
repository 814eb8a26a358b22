//! Quantised models on disk: files of the Python libraries read here, files written here read by them,
//! round trips, and files that are broken.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::{assert_same, device, fresh_dir, peer, python, read, write};
use tch::nn::{Init, VarStore};
use tch::{Kind, Tensor};
use tch_peft::{Base, Error, Fp8Format, QuantConfig, QuantConfigBuilder, Scheme, Treatment};

/// A store with variables of these names and shapes, zeros of f32.
fn store(shapes: &BTreeMap<String, Vec<i64>>) -> VarStore {
    let vs = VarStore::new(device());
    for (name, shape) in shapes {
        let (path, last) = name.rsplit_once('.').unwrap();
        let path = path.split('.').fold(vs.root(), |path, part| path.sub(part));
        let _ = path.f_var(last, shape, Init::Const(0.0)).unwrap();
    }
    vs
}

fn shapes_of(values: &BTreeMap<String, Tensor>) -> BTreeMap<String, Vec<i64>> {
    values.iter().map(|(name, value)| (name.clone(), value.size())).collect()
}

/// A second handle on every variable, which the base shares.
fn handles(vs: &VarStore) -> BTreeMap<String, Tensor> {
    vs.variables().into_iter().collect()
}

/// The values that the model computes with.
fn values(handles: &BTreeMap<String, Tensor>) -> BTreeMap<String, Tensor> {
    handles.iter().map(|(name, tensor)| (name.clone(), tensor.detach())).collect()
}

fn load(shapes: &BTreeMap<String, Vec<i64>>, path: &Path) -> Result<(Base<()>, BTreeMap<String, Tensor>), Error> {
    let vs = store(shapes);
    let handles = handles(&vs);
    Ok((Base::from(vs).load_quantized(path)?, handles))
}

/// Reads `<case>` and compares it with `<case>.values.safetensors`.
fn compare(folder: &Path, case: &str, packed: usize) -> Base<()> {
    let expected = read(folder.join(format!("{case}.values.safetensors")));
    let (base, handles) = load(&shapes_of(&expected), &folder.join(case)).unwrap_or_else(|e| panic!("{case}: {e}"));
    assert_eq!(base.quantization_report().weights().len(), packed, "{case}:\n{}", base.quantization_report());
    for (name, value) in values(&handles) {
        assert_same(&format!("{case} {name}"), &value.to_kind(expected[&name].kind()), &expected[&name]);
        // Dense ones have been widened to the module's f32, packed ones are in their own dtype.
        assert_same(&format!("{case} {name}"), &value.to_kind(Kind::Float), &expected[&name].to_kind(Kind::Float));
    }
    base
}

type Config = fn() -> QuantConfigBuilder;

const BNB: [(&str, Config, Kind); 4] = [
    ("bnb_nf4", QuantConfig::nf4, Kind::Float),
    ("bnb_nf4_double", || QuantConfig::nf4().double_quant(true), Kind::BFloat16),
    ("bnb_fp4", QuantConfig::fp4, Kind::Half),
    ("bnb_int8", || QuantConfig::builder(Scheme::LlmInt8), Kind::Half),
];
const QUANTO: [(&str, Config); 5] = [
    ("qint8", QuantConfig::int8),
    ("qint4", QuantConfig::int4),
    ("qint2", QuantConfig::int2),
    ("qfloat8_e4m3fn", || QuantConfig::fp8(Fp8Format::E4m3)),
    ("qfloat8_e5m2", || QuantConfig::fp8(Fp8Format::E5m2)),
];

/// Quantises random weights of these shapes, writes them, and their values beside them.
fn make(folder: &Path, case: &str, shapes: &BTreeMap<String, Vec<i64>>, config: &QuantConfig, kind: Kind) -> PathBuf {
    let mut vs = store(shapes);
    for (_, mut variable) in handles(&vs) {
        let random = Tensor::randn(variable.size(), (Kind::Float, device())) * 0.3;
        tch::no_grad(|| variable.copy_(&random));
    }
    match kind {
        Kind::BFloat16 => vs.bfloat16(),
        Kind::Half => vs.half(),
        _ => {}
    }
    let handles = handles(&vs);
    let base = Base::from(vs).quantize(config).unwrap();
    let path = folder.join(case);
    base.save_quantized(&path).unwrap();
    let values: Vec<_> = values(&handles).into_iter().collect();
    write(folder.join(format!("{case}.values.safetensors")), &values);
    path
}

/// The same models both ways. One test, since the Python side starts slowly.
#[test]
fn files_are_exchanged_with_the_python_libraries() {
    if python().is_none() {
        return;
    }
    let _rng = common::rng();
    let theirs = fresh_dir("quant_files_theirs");
    peer("quant_files.py", &["write".as_ref(), theirs.as_os_str()]);
    for (case, ..) in BNB {
        compare(&theirs, case, 14);
    }
    compare(&theirs, "bnb_storage", 14);
    for (name, _) in QUANTO {
        let packed = if name.starts_with("qint8") || name.starts_with("qfloat") { 5 } else { 4 };
        compare(&theirs, &format!("{name}_float32"), packed);
        compare(&theirs, &format!("{name}_bfloat16"), packed);
    }
    for case in ["gptq", "gptq_order", "gptq_v2", "awq"] {
        let base = compare(&theirs, case, 1);
        assert_eq!(base.quantization_report().weights()[0].scheme, Scheme::Gptq { group_size: 32 });
        // Ours again, by another name.
        let again = theirs.join(format!("{case}.ours"));
        base.save_quantized(&again).unwrap();
        let shapes = shapes_of(&read(theirs.join(format!("{case}.values.safetensors"))));
        let (reread, _) = load(&shapes, &again).unwrap();
        assert_eq!(reread.fingerprint().unwrap(), base.fingerprint().unwrap());
    }

    let ours = fresh_dir("quant_files_ours");
    for (case, config, kind) in BNB {
        let shapes = shapes_of(&read(theirs.join(format!("{case}.values.safetensors"))));
        let config = config().skip(["lm_head"]).build().unwrap();
        let path = make(&ours, case, &shapes, &config, kind);
        for name in ["config.json", "generation_config.json"] {
            std::fs::copy(theirs.join(case).join(name), path.join(name)).unwrap();
        }
    }
    for (name, config) in QUANTO {
        for (dtype, kind) in [("float32", Kind::Float), ("bfloat16", Kind::BFloat16)] {
            let case = format!("{name}_{dtype}");
            let shapes = shapes_of(&read(theirs.join(format!("{case}.values.safetensors"))));
            make(&ours, &case, &shapes, &config().convolutions(true).build().unwrap(), kind);
        }
    }
    peer("quant_files.py", &["read".as_ref(), ours.as_os_str()]);
}

const SCHEMES: [Scheme; 17] = [
    Scheme::Int8,
    Scheme::LlmInt8,
    Scheme::INT4,
    Scheme::Int4 { group_size: 32, hqq: false },
    Scheme::Int4 { group_size: 64, hqq: true },
    Scheme::INT2,
    Scheme::Int2 { group_size: 32, hqq: false },
    Scheme::FP8,
    Scheme::Fp8 { format: Fp8Format::E5m2 },
    Scheme::NF4,
    Scheme::NF4_DOUBLE,
    Scheme::FP4,
    Scheme::Fp4 { block_size: 32, double_quant: true },
    Scheme::Nf4 { block_size: 4096, double_quant: true },
    Scheme::Mxfp4,
    Scheme::Bf16,
    Scheme::F16,
];

fn small() -> BTreeMap<String, Vec<i64>> {
    let shape = |name: &str, shape: &[i64]| (name.to_string(), shape.to_vec());
    BTreeMap::from([
        shape("h.0.fc.weight", &[24, 256]),
        shape("h.0.fc.bias", &[24]),
        shape("h.1.fc.weight", &[5, 33]),
        shape("wte.weight", &[40, 64]),
        shape("conv.weight", &[6, 4, 3, 3]),
        shape("norm.weight", &[24]),
        shape("lm_head.weight", &[40, 64]),
    ])
}

/// Saved and loaded, a base has the same bytes, in one file or in many.
#[test]
fn a_saved_base_is_the_same_base() {
    let _rng = common::rng();
    let folder = fresh_dir("quant_files_round_trip");
    for (i, scheme) in SCHEMES.into_iter().enumerate() {
        let kind = [Kind::Float, Kind::BFloat16, Kind::Half][i % 3];
        let config = QuantConfig::builder(scheme)
            .embeddings(true)
            .convolutions(true)
            .rule("h.1.*", Scheme::Int8)
            .rule("lm_head", Treatment::Keep)
            .build()
            .unwrap();
        let case = format!("{scheme}");
        let path = make(&folder, &case, &small(), &config, kind);
        let expected = read(folder.join(format!("{case}.values.safetensors")));

        let mut vs = store(&small());
        match kind {
            Kind::BFloat16 => vs.bfloat16(),
            Kind::Half => vs.half(),
            _ => {}
        }
        let handles = handles(&vs);
        let base = Base::from(vs).load_quantized(&path).unwrap_or_else(|e| panic!("{case}: {e}"));
        let report = base.quantization_report();
        let schemes: Vec<_> = report.weights().iter().map(|w| (w.name.as_str(), w.scheme)).collect();
        let expected_schemes = [
            ("conv.weight", scheme),
            ("h.0.fc.weight", scheme),
            ("h.1.fc.weight", Scheme::Int8),
            ("wte.weight", scheme),
        ];
        assert_eq!(schemes, expected_schemes);
        for (name, value) in values(&handles) {
            assert_same(&format!("{case} {name}"), &value, &expected[&name]);
        }

        let sharded = folder.join(format!("{case}.shards"));
        base.save_quantized_sharded(&sharded, 3000).unwrap();
        let shards = std::fs::read_dir(&sharded)
            .unwrap()
            .filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().ends_with(".safetensors"));
        assert!(shards.count() > 1, "{case}");
        let mut vs = store(&small());
        match kind {
            Kind::BFloat16 => vs.bfloat16(),
            Kind::Half => vs.half(),
            _ => {}
        }
        let again = Base::from(vs).load_quantized(&sharded).unwrap();
        assert_eq!(again.fingerprint().unwrap(), base.fingerprint().unwrap(), "{case}");
        assert_eq!(again.quantization_report(), base.quantization_report());
        // A folder with parts of another model would mix the two.
        assert!(matches!(base.save_quantized(&sharded).unwrap_err(), Error::Config { .. }));
    }
}

/// Rules, roles, progress, and what is refused.
#[test]
fn rules_choose_and_progress_is_told() {
    let _rng = common::rng();
    let vs = store(&small());
    let mut told = Vec::new();
    let config = QuantConfig::nf4().rule("h.*.fc", Scheme::Int8).rule("conv", Scheme::INT4).build().unwrap();
    let options = tch_peft::QuantizeOptions::new()
        .device(device())
        .progress(|p| told.push((p.weight.name.clone(), p.weight.scheme, p.done, p.total)));
    let base = Base::from(vs).quantize_with(&config, options).unwrap();
    let expected = [
        ("conv.weight", Scheme::INT4),
        ("h.0.fc.weight", Scheme::Int8),
        ("h.1.fc.weight", Scheme::Int8),
        ("lm_head.weight", Scheme::NF4),
    ];
    let expected: Vec<_> =
        expected.into_iter().enumerate().map(|(i, (name, scheme))| (name.to_string(), scheme, i + 1, 4)).collect();
    assert_eq!(told, expected);
    drop(base);
    let config = QuantConfig::nf4().rule("no_such", Scheme::Int8).build().unwrap();
    let error = Base::from(store(&small())).quantize(&config).unwrap_err();
    assert!(matches!(&error, Error::NoTarget { target, .. } if target == "no_such"), "{error}");
}

/// The tensors of a saved model, changed by `change` and written again, without our index but with
/// quanto's map.
fn broken(from: &Path, to: &Path, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> PathBuf {
    let mut tensors = read(from.join("model.safetensors"));
    change(&mut tensors);
    std::fs::create_dir_all(to).unwrap();
    let map = "quantization_map.json";
    match from.join(map).exists() {
        true => drop(std::fs::copy(from.join(map), to.join(map)).unwrap()),
        false => drop(std::fs::remove_file(to.join(map))),
    }
    let tensors: Vec<_> = tensors.into_iter().collect();
    write(to.join("model.safetensors"), &tensors);
    to.into()
}

/// Every companion tensor that is missing, of another dtype or of another shape is an error.
#[test]
fn damaged_companions_are_refused() {
    let _rng = common::rng();
    let folder = fresh_dir("quant_files_broken");
    let shapes = BTreeMap::from([("h.fc.weight".to_string(), vec![24, 256])]);
    for scheme in [Scheme::Int8, Scheme::LlmInt8, Scheme::INT4, Scheme::INT2, Scheme::NF4_DOUBLE, Scheme::FP4] {
        let config = QuantConfig::builder(scheme).build().unwrap();
        let path = make(&folder, &format!("{scheme}"), &shapes, &config, Kind::Float);
        let keys: Vec<String> = read(path.join("model.safetensors")).into_keys().collect();
        let to = folder.join("changed");
        for key in keys.iter().filter(|key| !key.ends_with("put_scale") && !key.ends_with("weight_format")) {
            let refused = |what: &str, change: &dyn Fn(&mut BTreeMap<String, Tensor>)| {
                let to = broken(&path, &to, |tensors| change(tensors));
                if let Ok((base, _)) = load(&shapes, &to) {
                    panic!("{scheme}: {key} {what} was accepted:\n{}", base.quantization_report());
                }
            };
            refused("missing", &|t| drop(t.remove(key)));
            refused("of f64", &|t| drop(t.insert(key.clone(), t[key].to_kind(Kind::Double))));
            refused("longer", &|t| {
                let flat = t[key].flatten(0, -1);
                t.insert(key.clone(), Tensor::cat(&[&flat, &flat], 0));
            });
            refused("empty", &|t| drop(t.insert(key.clone(), Tensor::zeros([0], (t[key].kind(), device())))));
            if read(path.join("model.safetensors"))[key].kind() == Kind::Float && !key.ends_with("quant_map") {
                refused("NaN", &|t| drop(t.insert(key.clone(), t[key].full_like(f64::NAN))));
            }
        }
        let to = broken(&path, &to, |t| drop(t.insert("h.other.weight".into(), Tensor::from(1f32))));
        let error = load(&shapes, &to).unwrap_err();
        assert!(matches!(&error, Error::Keys { unexpected, .. } if unexpected == &["h.other.weight"]), "{error}");
    }
}

/// Torn and edited files are errors.
#[test]
fn torn_files_and_false_indices_are_refused() {
    let _rng = common::rng();
    let folder = fresh_dir("quant_files_torn");
    let shapes = BTreeMap::from([("h.fc.weight".to_string(), vec![24, 256])]);
    let path = make(&folder, "model", &shapes, &QuantConfig::nf4().build().unwrap(), Kind::Float);
    let (file, index) = (path.join("model.safetensors"), path.join("model.safetensors.index.json"));
    let (bytes, text) = (std::fs::read(&file).unwrap(), std::fs::read_to_string(&index).unwrap());
    for len in [0, 1, 7, 8, 9, 100, bytes.len() / 2, bytes.len() - 1] {
        std::fs::write(&file, &bytes[..len]).unwrap();
        let error = load(&shapes, &path).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. } | Error::Io { .. }), "{len}: {error}");
    }
    // A header that claims to be huge.
    let mut huge = bytes.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&file, &huge).unwrap();
    assert!(matches!(load(&shapes, &path).unwrap_err(), Error::Corrupt { .. }));
    std::fs::write(&file, &bytes).unwrap();
    for (from, to) in [
        ("model.safetensors", "../model.safetensors"),
        ("model.safetensors", "/etc/passwd"),
        ("\"model.safetensors\"", "\"\""),
        ("h.fc.weight.absmax", "h.fc.weight.abs"),
        ("\"nf4\"", "\"int8\""),
        ("\"nf4\"", "\"nf5\""),
        ("\"F32\"", "\"BF16\""),
        ("{", "["),
    ] {
        let edited = text.replace(from, to);
        assert_ne!(edited, text);
        std::fs::write(&index, edited).unwrap();
        let error = load(&shapes, &path).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. } | Error::Mismatch { .. }), "{from} -> {to}: {error}");
    }
    std::fs::write(&index, &text).unwrap();
    load(&shapes, &path).unwrap();
    let error = load(&BTreeMap::from([("h.fc.weight".to_string(), vec![256, 24])]), &path).unwrap_err();
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
}

/// A buffer that no file holds is left as the module made it, if the caller says so by name.
#[test]
fn buffers_may_be_missing_by_name() {
    let _rng = common::rng();
    let folder = fresh_dir("quant_files_buffers");
    let file = folder.join("model.safetensors");
    let weight = Tensor::randn([8, 64], (Kind::Float, device()));
    write(&file, &[("a.fc.weight".to_string(), weight.shallow_clone())]);
    let base = || {
        let vs = VarStore::new(device());
        let _ = (vs.root() / "a" / "fc").f_var("weight", &[8, 64], Init::Const(0.0)).unwrap();
        let rotary = vs.root() / "a" / "rotary_emb";
        let _ = rotary.f_var("inv_freq", &[16], Init::Const(0.5)).unwrap();
        let handles = handles(&vs);
        (Base::from(vs), handles)
    };
    let config = QuantConfig::int8().build().unwrap();
    let missing = |error: Error, name: &str| match error {
        Error::Keys { missing, .. } => assert_eq!(missing, [name]),
        other => panic!("{other}"),
    };
    missing(base().0.load_and_quantize(&file, &config).unwrap_err(), "a.rotary_emb.inv_freq");
    missing(base().0.load_quantized(&file).unwrap_err(), "a.rotary_emb.inv_freq");
    for entry in ["inv_freq", "rotary_emb.inv_freq", "a.rotary_emb.inv_freq"] {
        let (base, handles) = base();
        let base = base.allow_missing(entry).unwrap().load_and_quantize(&file, &config).unwrap();
        assert_eq!(base.quantization_report().weights().len(), 1);
        let values = values(&handles);
        assert_same(entry, &values["a.rotary_emb.inv_freq"], &Tensor::full([16], 0.5, (Kind::Float, device())));
        let packed = tch_peft::quant::quantize("w", &weight, Scheme::Int8).unwrap();
        assert_same(entry, &values["a.fc.weight"], &packed.dequantize(Kind::Float).unwrap());
    }
    base().0.allow_missing("inv_freq").unwrap().load_quantized(&file).unwrap();
    for entry in ["freq", "rotary_emb", "fc.bias", ""] {
        assert!(matches!(base().0.allow_missing(entry), Err(Error::Config { .. })), "{entry}");
    }
    // Of what is to be packed, nothing may be missing.
    write(&file, &[("a.rotary_emb.inv_freq".to_string(), Tensor::ones([16], (Kind::Float, device())))]);
    let (base, _) = base();
    let base = base.allow_missing("fc.weight").unwrap();
    missing(base.load_and_quantize(&file, &config).unwrap_err(), "a.fc.weight");
}
