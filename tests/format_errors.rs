//! Adapters in other programs' layouts, without the programs: what is exact, what is refused, and that no file
//! whatever makes the reader panic.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use common::{assert_same, read, rng};
use safetensors::tensor::{Dtype, TensorView, serialize};
use tch::nn::{self, Module};
use tch::{Device, Kind, Tensor};
use tch_peft::{AdapterFile, AdapterFormat, Base, Error, KeyMapping, LoraConfig, LoraConfigBuilder, LoraModel};

fn randomise<M>(model: &LoraModel<M>) {
    let _no_grad = tch::no_grad_guard();
    for mut p in model.trainable_parameters() {
        let _ = p.tensor.normal_(0.0, 0.2);
    }
}

/// A file with its bytes, to be compared.
fn bytes(path: PathBuf) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

#[test]
fn alpha_is_kept_to_the_bit() {
    let _rng = rng();
    let dir = common::fresh_dir("formats_alpha");
    for (alpha, kind) in [(10.0, Kind::Float), (0.3, Kind::Double), (0.5, Kind::Float)] {
        let config = LoraConfig::builder().r(2).lora_alpha(alpha).target_modules(["a_b", "c"]).build().unwrap();
        let model = LoraModel::wrap(small(&["x.a_b", "x.c"]), config).unwrap();
        randomise(&model);
        for format in [AdapterFormat::Kohya, AdapterFormat::ComfyUi] {
            let path = dir.join(format!("{alpha}.{format}.safetensors"));
            model.save_as("default", format, &path).unwrap();
            let tensors = read(&path);
            let alphas: Vec<_> = tensors.iter().filter(|(key, _)| key.ends_with(".alpha")).collect();
            assert_eq!(alphas.len(), 2, "{:?}", tensors.keys());
            assert!(alphas.iter().all(|(_, alpha)| alpha.kind() == kind && alpha.dim() == 0));
            let again = LoraModel::init_lora(small(&["x.a_b", "x.c"]), &path).unwrap();
            assert_eq!(again.config().as_lora().unwrap().lora_alpha(), alpha);
            for (ours, theirs) in model.parameters().iter().zip(again.parameters()) {
                assert_same(&ours.name, &theirs.tensor, &ours.tensor);
            }
            model.save_as("default", format, dir.join("again.safetensors")).unwrap();
            assert_eq!(bytes(dir.join("again.safetensors")), bytes(path), "written twice");
        }
        // Folded, where the layout has none: B · alpha / r.
        let path = dir.join("folded.safetensors");
        model.save_as("default", AdapterFormat::DiffusersOld, AdapterFile::new(&path).component("unet")).unwrap();
        let folded = &read(&path)["unet.x.c.lora.up.weight"];
        let b = model.parameters().into_iter().find(|p| p.name.ends_with("x.c.lora_B.weight")).unwrap().tensor;
        assert_same("folded", folded, &(b * (alpha / 2.0)).detach());
    }
}

/// Linear layers (6, 6) at these paths.
fn small(paths: &[&str]) -> Base<nn::Sequential> {
    let vs = nn::VarStore::new(Device::Cpu);
    let mut net = nn::seq();
    for path in paths {
        let place = path.split('.').fold(vs.root(), |place, segment| place / segment);
        net = net.add(nn::linear(place, 6, 6, Default::default()));
    }
    Base::new(vs, net)
}

fn factors(key: &str, down: &str, up: &str) -> Vec<(String, Tensor)> {
    let draw = |sizes: [i64; 2]| Tensor::randn(sizes, (Kind::Float, Device::Cpu));
    vec![(format!("{key}{down}"), draw([2, 6])), (format!("{key}{up}"), draw([6, 2]))]
}

fn kohya(key: &str) -> Vec<(String, Tensor)> {
    factors(&format!("lora_unet_{key}"), ".lora_down.weight", ".lora_up.weight")
}

/// Underscores for dots: a base may have two modules that look the same then.
#[test]
fn ambiguous_names_are_refused_by_name() {
    let _rng = rng();
    let dir = common::fresh_dir("formats_ambiguous");
    let paths = ["a.b_c", "a_b.c", "d.e"];
    common::write(dir.join("clear.safetensors"), &kohya("d_e"));
    let model = LoraModel::init_lora(small(&paths), dir.join("clear.safetensors")).unwrap();
    assert_eq!(model.layers(), ["d.e"]);

    common::write(dir.join("unclear.safetensors"), &kohya("a_b_c"));
    let file = AdapterFile::new(dir.join("unclear.safetensors"));
    let error = LoraModel::init_lora(small(&paths), file.clone()).unwrap_err().to_string();
    assert!(error.contains("a.b_c") && error.contains("a_b.c") && error.contains("lora_unet_a_b_c"), "{error}");

    let config = LoraConfig::builder().r(2).target_modules(["a.b_c"]).build().unwrap();
    let model = LoraModel::wrap(small(&paths), config).unwrap();
    let error = model.save_as("default", AdapterFormat::Kohya, dir.join("out.safetensors")).unwrap_err().to_string();
    assert!(error.contains("a.b_c and a_b.c"), "{error}");
    assert!(!dir.join("out.safetensors").exists());

    // A rule tells them apart, in both directions.
    let mapping = KeyMapping::builder().exact("a_b.c", "other.c").build().unwrap();
    let model = LoraModel::init_lora(small(&paths), file.key_mapping(mapping.clone())).unwrap();
    assert_eq!(model.layers(), ["a.b_c"]);
    let out = AdapterFile::new(dir.join("out.safetensors")).key_mapping(mapping);
    model.save_as("default", AdapterFormat::Kohya, out.clone()).unwrap();
    let again = LoraModel::init_lora(small(&paths), out).unwrap();
    assert_eq!(again.layers(), ["a.b_c"]);
}

/// Everything that has no place is told by its key, and nothing is half loaded.
#[test]
fn what_a_file_has_too_much_or_too_little_is_told() {
    let _rng = rng();
    let dir = common::fresh_dir("formats_broken");
    let open = |name: &str, tensors: Vec<Vec<(String, Tensor)>>| {
        common::write(dir.join(name), &tensors.into_iter().flatten().collect::<Vec<_>>());
        LoraModel::init_lora(small(&["a", "b.proj", "proj"]), dir.join(name)).unwrap_err()
    };
    let one = |name: &str| vec![(name.to_string(), Tensor::ones([6, 2], (Kind::Float, Device::Cpu)))];
    let lists = |error: Error, wanted: &str| match &error {
        Error::Keys { missing, unexpected, .. } => {
            let listed = missing.iter().chain(unexpected).any(|key| key.contains(wanted));
            assert!(listed, "{wanted}: {error}");
        }
        _ => panic!("{wanted}: {error}"),
    };
    lists(open("module.safetensors", vec![kohya("a"), kohya("zz")]), "lora_unet_zz.lora_up.weight");
    lists(open("end.safetensors", vec![kohya("a"), one("lora_unet_a.diff")]), "lora_unet_a.diff");
    lists(open("half.safetensors", vec![one("unet.a.lora_B.weight")]), "the other half of unet.a.lora_B.weight");
    lists(open("alpha.safetensors", vec![kohya("a"), one("lora_unet_proj.alpha")]), "lora_unet_proj.alpha");
    let twice = vec![
        factors("unet.a", ".lora_A.weight", ".lora_B.weight"),
        factors("unet.a", ".lora.down.weight", ".lora.up.weight"),
    ];
    let error = open("twice.safetensors", twice).to_string();
    assert!(error.contains("unet.a.lora_A.weight") && error.contains("unet.a.lora.down.weight"), "{error}");
    let error = open("number.safetensors", vec![kohya("a"), one("lora_unet_a.alpha")]).to_string();
    assert!(error.contains("lora_unet_a.alpha") && error.contains("one number"), "{error}");
    let peft = factors("base_model.model.a", ".lora_A.weight", ".lora_B.weight");
    let error = open("peft.safetensors", vec![peft]).to_string();
    assert!(error.contains("adapter_config.json"), "{error}");
    let error = open("lycoris.safetensors", vec![one("lora_unet_a.hada_w1_a")]);
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    let error = open("dora.safetensors", vec![kohya("a"), one("lora_unet_a.dora_scale")]);
    assert!(matches!(error, Error::Unsupported { .. }), "{error}");

    // A folder with several files, and a component that isn't there.
    let error = LoraModel::init_lora(small(&["a"]), &dir).unwrap_err().to_string();
    assert!(error.contains("twice.safetensors") && error.contains("alpha.safetensors"), "{error}");
    common::write(dir.join("good.safetensors"), &kohya("proj"));
    let file = AdapterFile::new(dir.join("good.safetensors"));
    let error = LoraModel::init_lora(small(&["proj"]), file.clone().component("text_encoder")).unwrap_err();
    assert!(error.to_string().contains("text_encoder; expected one of those in"), "{error}");
    // `proj` alone, although PEFT's list would mean `b.proj` too.
    let model = LoraModel::init_lora(small(&["b.proj", "proj"]), file.clone().component("transformer")).unwrap();
    assert_eq!(model.layers(), ["proj"]);
    let x = Tensor::randn([3, 6], (Kind::Float, Device::Cpu));
    let _ = model.module().forward(&x);
    let error = LoraModel::init_lora(small(&["proj"]), file.format(AdapterFormat::ComfyUi)).unwrap_err();
    assert!(matches!(error, Error::Config { .. } | Error::Keys { .. }), "{error}");
}

#[test]
fn what_a_layout_cannot_hold_is_refused_by_name() {
    let _rng = rng();
    let dir = common::fresh_dir("formats_refused");
    let refused = |config: LoraConfigBuilder, format, wanted: &str| {
        let model = LoraModel::wrap(small(&["a", "b"]), config.r(2).target_modules(["a"]).build().unwrap()).unwrap();
        let file = AdapterFile::new(dir.join("x.safetensors")).component("unet");
        let error = model.save_as("default", format, file).unwrap_err();
        assert!(error.to_string().contains(wanted), "{error}");
        assert!(!dir.join("x.safetensors").exists());
    };
    let config = LoraConfig::builder;
    refused(config().use_dora(true), AdapterFormat::Kohya, "lora_magnitude_vector of a in the layout of kohya");
    refused(config().lora_bias(true), AdapterFormat::ComfyUi, "lora_B.bias of a");
    refused(config().modules_to_save(["b"]), AdapterFormat::Diffusers, "modules_to_save");
    refused(config(), AdapterFormat::Peft, "a folder");
    let model = LoraModel::wrap(small(&["a"]), config().r(2).target_modules(["a"]).build().unwrap()).unwrap();
    let error = model.save_as("default", AdapterFormat::Diffusers, dir.join("x")).unwrap_err().to_string();
    assert!(error.contains("component") && error.contains("transformer"), "{error}");
    let file = AdapterFile::new(dir.join("x.safetensors")).format(AdapterFormat::Kohya);
    assert!(model.save_as("default", AdapterFormat::ComfyUi, file).is_err());
}

/// A file of diffusers with this `lora_adapter_metadata`, for the linear layers `a` and `b`.
fn with_header(path: &Path, keys: &[&str], metadata: &str) {
    let data = [0u8; 48];
    let view = |shape: [usize; 2]| TensorView::new(Dtype::F32, shape.to_vec(), &data).unwrap();
    let tensors: BTreeMap<String, TensorView<'_>> = keys
        .iter()
        .flat_map(|key| {
            let [a, b] = ["A", "B"].map(|half| format!("unet.{key}.lora_{half}.weight"));
            [(a, view([2, 6])), (b, view([6, 2]))]
        })
        .collect();
    let metadata = HashMap::from([("lora_adapter_metadata".to_string(), metadata.to_string())]);
    std::fs::write(path, serialize(tensors, Some(metadata)).unwrap()).unwrap();
}

#[test]
fn the_configuration_in_a_header_is_read_strictly() {
    let _rng = rng();
    let dir = common::fresh_dir("formats_header");
    let path = dir.join("x.safetensors");
    let open = |keys: &[&str], metadata: &str| {
        with_header(&path, keys, metadata);
        LoraModel::init_lora(small(&["a", "b", "c.a"]), &path)
    };
    // Only some of PEFT's fields, and those of another component.
    let model = open(&["a", "b"], r#"{"unet.r": 2, "unet.lora_alpha": 7, "text_encoder.r": 9}"#).unwrap();
    assert_eq!((model.config().as_lora().unwrap().lora_alpha(), model.layers()), (7.0, vec!["a", "b"]));
    let model = open(&["a"], r#"{"unet.r": 2, "unet.lora_dropout": 0.25, "unet.target_modules": ["a"]}"#).unwrap();
    assert_eq!((model.config().as_lora().unwrap().lora_dropout(), model.layers()), (0.25, vec!["a"]));
    // Nothing about this component: alpha is the rank.
    let model = open(&["a"], r#"{"text_encoder.r": 9}"#).unwrap();
    assert_eq!((model.config().as_lora().unwrap().r(), model.config().as_lora().unwrap().lora_alpha()), (2, 2.0));
    // What is unknown is kept and told.
    let model = open(&["a"], r#"{"unet.r": 2, "unet.later": [1]}"#).unwrap();
    assert_eq!(model.load_report().unwrap().unknown_config_keys, ["later"]);

    for (metadata, wanted) in [
        ("{", "lora_adapter_metadata"),
        ("[1]", "lora_adapter_metadata"),
        (r#"{"unet.r": "two"}"#, "`r` is"),
        (r#"{"unet.r": 0}"#, "`r` is 0"),
        (r#"{"unet.r": 3}"#, "r = 3"),
        (r#"{"unet.peft_type": "LOHA", "unet.r": 2}"#, "LOHA"),
        (r#"{"unet.r": 2, "unet.target_modules": ["a", "b"]}"#, "those of b"),
        (r#"{"unet.r": 2, "unet.target_modules": "all-linear"}"#, "those of b, those of c.a"),
        (r#"{"unet.r": 2, "unet.use_dora": true}"#, "lora_magnitude_vector"),
        (r#"{"unet.r": 2, "unet.modules_to_save": ["b"]}"#, "b.weight"),
        (r#"{"unet.r": 2, "unet.use_qalora": true}"#, "use_qalora"),
    ] {
        let error = open(&["a"], metadata).unwrap_err().to_string();
        assert!(error.contains(wanted), "{metadata}: {error}");
    }
}

/// Cut short at every length, and with bytes changed at random: an error or a sound adapter, never a panic.
#[test]
fn damaged_files_are_errors() {
    let _rng = rng();
    let dir = common::fresh_dir("formats_damaged");
    let config = LoraConfig::builder().r(2).lora_alpha(0.3).target_modules(["a", "c.a"]);
    let model = LoraModel::wrap(small(&["a", "c.a"]), config.build().unwrap()).unwrap();
    randomise(&model);
    let mut state = 7u64;
    let mut random = move |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    for format in [AdapterFormat::Diffusers, AdapterFormat::DiffusersOld, AdapterFormat::Kohya, AdapterFormat::ComfyUi]
    {
        let whole = dir.join("whole.safetensors");
        let file =
            AdapterFile::new(&whole).component(if format == AdapterFormat::ComfyUi { "transformer" } else { "unet" });
        model.save_as("default", format, file).unwrap();
        let bytes = bytes(whole);
        let open = |bytes: &[u8]| {
            let path = dir.join("damaged.safetensors");
            std::fs::write(&path, bytes).unwrap();
            let _ = AdapterFile::new(&path).detect();
            LoraModel::init_lora(small(&["a", "c.a"]), &path)
        };
        open(&bytes).unwrap();
        for length in (0..bytes.len()).step_by(97) {
            assert!(open(&bytes[..length]).is_err(), "{format}: {length} of {} bytes", bytes.len());
        }
        let mut refused = 0;
        for _ in 0..150 {
            let mut damaged = bytes.clone();
            let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
            let at = random(header);
            damaged[at] = damaged[at].wrapping_add(1 + random(255) as u8);
            refused += usize::from(open(&damaged).is_err());
        }
        assert!(refused > 50, "{format}: {refused} of 150 refused");
    }
}
