//! Adapters in other programs' layouts, without the programs: what is exact, and what is refused.

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
    lists(open("end.safetensors", vec![kohya("a"), one("lora_unet_a.other")]), "lora_unet_a.other");
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

/// LoHa and LoKr whose parts don't make a whole, and what is no adapter here.
#[test]
fn parts_that_make_no_whole_are_told() {
    let _rng = rng();
    let dir = common::fresh_dir("formats_parts");
    let open = |parts: &[(&str, &[i64])]| {
        let draw = |sizes: &[i64]| Tensor::randn(sizes, (Kind::Float, Device::Cpu));
        let tensors: Vec<_> = parts.iter().map(|(end, sizes)| (format!("lora_unet_{end}"), draw(sizes))).collect();
        common::write(dir.join("x.safetensors"), &tensors);
        LoraModel::init_lora(small(&["a", "b"]), dir.join("x.safetensors"))
    };
    let loha: [(&str, &[i64]); 4] =
        [("a.hada_w1_a", &[6, 2]), ("a.hada_w1_b", &[2, 6]), ("a.hada_w2_a", &[6, 2]), ("a.hada_w2_b", &[2, 6])];
    let lokr: [(&str, &[i64]); 2] = [("b.lokr_w1", &[2, 3]), ("b.lokr_w2", &[3, 2])];
    assert_eq!(open(&loha).unwrap().layers(), ["a"]);
    // No one factor gives W1 these sizes.
    assert_eq!(open(&lokr).unwrap().config().layer_settings(["b"])[0].w1, Some([2, 3]));
    let told = |parts: Vec<(&str, &[i64])>, wanted: &str| {
        let error = open(&parts).unwrap_err();
        assert!(error.to_string().contains(wanted), "{wanted}: {error}");
        error
    };
    for gone in 0..4 {
        let mut parts = loha.to_vec();
        parts.remove(gone);
        assert!(matches!(told(parts, "the other half of lora_unet_a.hada"), Error::Keys { .. }));
    }
    let with = |first: &[(&'static str, &'static [i64])], more: (&'static str, &'static [i64])| {
        first.iter().copied().chain([more]).collect::<Vec<_>>()
    };
    told(lokr[..1].to_vec(), "lokr_w2 of b");
    told(lokr[1..].to_vec(), "lokr_w1 of b");
    let both = with(&with(&lokr, ("b.lokr_w2_a", &[3, 1])), ("b.lokr_w2_b", &[1, 2]));
    told(both, "lora_unet_b.lokr_w2 and lora_unet_b.lokr_w2_a are both for one part");
    told(with(&lokr, ("b.lokr_t2", &[1, 1, 1, 1])), "lora_unet_b.lokr_t2");
    told(with(&loha, ("a.lokr_w1", &[1, 1])), "a.hada_w1_a and lora_unet_a.lokr_w1 are both");
    told(with(&loha, ("a.lora_mid.weight", &[2, 2, 3, 3])), "lora_unet_a.lora_mid.weight");
    let refused = |parts: Vec<(&str, &[i64])>, wanted: &str| {
        let error = told(parts, wanted);
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    };
    refused(with(&loha, ("a.dora_scale", &[6, 1])), "DoRA of LoHa");
    refused(loha.into_iter().chain(lokr).collect(), "LoHa of a beside LoKr of b");
    refused(vec![("a.diff", &[6, 6])], "the whole difference of a weight");
    refused(vec![("a.w_norm", &[6])], "a norm's weight");
    refused(vec![("a.on_input", &[]), ("a.weight", &[6])], "IA3");
    let lora: [(&str, &[i64]); 2] = [("a.lora_down.weight", &[2, 6]), ("a.lora_up.weight", &[6, 2])];
    refused(with(&lora, ("a.dora_scale", &[1, 6])), "one value for each of 6 outputs");
    told(with(&lora, ("a.lora_mid.weight", &[2, 2, 3, 3])), "(r, r, kernel…)");
    // Factors that aren't the weight's.
    told(vec![("b.lokr_w1", &[2, 3]), ("b.lokr_w2", &[3, 3])], "factors of LoKr for b [6, 6]");
    told(vec![("b.lokr_w1", &[0, 3]), ("b.lokr_w2", &[3, 2])], "factors of LoKr for b [6, 6]");
    refused(vec![("b.lokr_w1", &[1, 1]), ("b.lokr_w2_a", &[6, 3]), ("b.lokr_w2_b", &[3, 6])], "rank 3");
}

/// Numbers of which no adapter can be made: nothing is allocated for them.
#[test]
fn absurd_ranks_and_alphas_are_refused() {
    let _rng = rng();
    let dir = common::fresh_dir("formats_absurd");
    let config = LoraConfig::builder().r(2).lora_alpha(4.0).target_modules(["a"]).build().unwrap();
    let model = LoraModel::wrap(small(&["a"]), config).unwrap();
    model.save_pretrained(&dir).unwrap();
    let path = dir.join("adapter_config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let open = |from: &str, to: &str| {
        assert!(text.contains(from));
        std::fs::write(&path, text.replace(from, to)).unwrap();
        LoraModel::init_lora(small(&["a"]), &dir).unwrap_err().to_string()
    };
    let error = open("\"r\": 2", "\"r\": 1000000000");
    assert!(error.contains("at most 6, the largest size in the file"), "{error}");
    let error = open("\"lora_alpha\": 4", "\"lora_alpha\": 1e39");
    assert!(error.contains("`lora_alpha` is"), "{error}");

    // A file's own alpha may be of f64.
    let mut tensors = kohya("a");
    tensors.push(("lora_unet_a.alpha".into(), Tensor::full([], 1e39, (Kind::Double, Device::Cpu))));
    common::write(dir.join("x.safetensors"), &tensors);
    let error = LoraModel::init_lora(small(&["a"]), dir.join("x.safetensors")).unwrap_err().to_string();
    assert!(error.contains("`lora_alpha` is"), "{error}");
}

/// Flux' own code has one layer for queries, keys and values: its rows are those of three modules.
#[test]
fn rows_of_a_fused_layer_are_told_apart() {
    let _rng = rng();
    let dir = common::fresh_dir("formats_fused");
    let paths = ["to_q", "to_k", "to_v"].map(|end| format!("transformer_blocks.0.attn.{end}"));
    let paths = paths.each_ref().map(String::as_str);
    let open = |parts: &[(&str, &[i64])]| {
        let draw = |sizes: &[i64]| Tensor::randn(sizes, (Kind::Float, Device::Cpu));
        let named = |end: &str| format!("lora_unet_double_blocks_0_img_attn_qkv.{end}");
        let tensors: Vec<_> = parts.iter().map(|(end, sizes)| (named(end), draw(sizes))).collect();
        common::write(dir.join("x.safetensors"), &tensors);
        LoraModel::init_lora(small(&paths), dir.join("x.safetensors"))
    };
    let delta = |model: LoraModel<nn::Sequential>| {
        let parameters = model.parameters();
        let find = |path: &str, end: &str| {
            let wanted = format!("base_model.model.{path}.{end}");
            parameters.iter().find(|p| p.name == wanted).map(|p| p.tensor.detach()).unwrap()
        };
        let of = |path: &&str| match model.config().peft_type() {
            "LOHA" => {
                let half = |n: u8| find(path, &format!("hada_w{n}_a")).mm(&find(path, &format!("hada_w{n}_b")));
                half(1) * half(2)
            }
            _ => find(path, "lokr_w1").kron(&find(path, "lokr_w2")),
        };
        Tensor::cat(&paths.iter().map(of).collect::<Vec<_>>(), 0)
    };
    let whole = |ends: [&str; 2]| {
        let file = read(dir.join("x.safetensors"));
        ends.map(|end| file[&format!("lora_unet_double_blocks_0_img_attn_qkv.{end}")].shallow_clone())
    };
    let model =
        open(&[("hada_w1_a", &[18, 2]), ("hada_w1_b", &[2, 6]), ("hada_w2_a", &[18, 2]), ("hada_w2_b", &[2, 6])]);
    let found = delta(model.unwrap());
    let [a, b] = [whole(["hada_w1_a", "hada_w1_b"]), whole(["hada_w2_a", "hada_w2_b"])].map(|[a, b]| a.mm(&b));
    common::assert_close("LoHa", &found, &(a * b), 1e-6);

    let found = delta(open(&[("lokr_w1", &[3, 2]), ("lokr_w2", &[6, 3])]).unwrap());
    let [w1, w2] = whole(["lokr_w1", "lokr_w2"]);
    common::assert_close("LoKr", &found, &w1.kron(&w2), 1e-6);
    let error = open(&[("lokr_w1", &[2, 2]), ("lokr_w2", &[9, 3])]).unwrap_err();
    assert!(error.to_string().contains("rows 0 to 6 of a Kronecker product by 9"), "{error}");
}

/// ComfyUI calls each text encoder by a name of its own.
#[test]
fn text_encoders_go_by_comfyuis_names() {
    let _rng = rng();
    let dir = common::fresh_dir("formats_comfyui");
    let paths = ["encoder.layers.0.mlp.fc1"];
    let config = LoraConfig::builder().r(2).target_modules(["fc1"]).build().unwrap();
    let model = LoraModel::wrap(small(&paths), config).unwrap();
    randomise(&model);
    let save = |component: &str| {
        let file = AdapterFile::new(dir.join(format!("{component}.safetensors"))).component(component);
        model.save_as("default", AdapterFormat::ComfyUi, file.clone()).map(|()| file)
    };
    let files = ["clip_l", "t5xxl", "transformer"].map(|component| save(component).unwrap());
    let keys: Vec<String> = read(dir.join("clip_l.safetensors")).into_keys().collect();
    let stem = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1";
    assert_eq!(keys, ["alpha", "lora_A.weight", "lora_B.weight"].map(|end| format!("{stem}.{end}")));
    assert!(save("text_encoder").unwrap_err().to_string().contains("clip_l"));

    let all = dir.join("all.safetensors");
    AdapterFile::join(&files, &all).unwrap();
    let found = AdapterFile::new(&all).detect().unwrap();
    assert_eq!((found.format, found.components.len()), (AdapterFormat::ComfyUi, 3), "{found}");
    for component in found.components {
        let again = LoraModel::init_lora(small(&paths), AdapterFile::new(&all).component(component)).unwrap();
        for (ours, theirs) in model.parameters().iter().zip(again.parameters()) {
            assert_same(&ours.name, &theirs.tensor, &ours.tensor);
        }
    }
    let error = LoraModel::init_lora(small(&paths), AdapterFile::new(&all).component("text_encoder")).unwrap_err();
    assert!(error.to_string().contains("clip_l, t5xxl, transformer"), "{error}");

    // What can't be one file.
    let join = |files: &[AdapterFile]| AdapterFile::join(files, dir.join("no.safetensors")).unwrap_err().to_string();
    assert!(join(&[]).contains("at least one"));
    assert!(join(&[files[0].clone(), files[0].clone()]).contains("in another of the files too"));
    model.save_as("default", AdapterFormat::Kohya, dir.join("kohya.safetensors")).unwrap();
    assert!(join(&[files[0].clone(), dir.join("kohya.safetensors").into()]).contains("ComfyUI and kohya"));
    model.save_pretrained(dir.join("peft")).unwrap();
    assert!(join(&[dir.join("peft").into()]).contains("PEFT's folder"));
}
