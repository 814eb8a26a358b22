//! `LoraConfig` and `adapter_config.json`, against PEFT.

mod common;

use common::{fresh_dir, peer, python};
use tch_peft::{Bias, Error, InitLoraWeights, LoraConfig, LoraConfigBuilder, TargetModules};

/// One configuration for each field of PEFT's, and what is written after reading it.
#[test]
fn every_field_that_peft_writes_is_written_again_byte_for_byte() {
    if python().is_none() {
        return;
    }
    let dir = fresh_dir("config_from_peft");
    peer("config_reference.py", &["make".as_ref(), dir.as_os_str()]);
    let mut seen = 0;
    for entry in std::fs::read_dir(dir.join("from_peft")).unwrap() {
        let folder = entry.unwrap().path();
        let config = LoraConfig::from_pretrained(&folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let again = folder.join("again");
        config.save_pretrained(&again).unwrap();
        let [theirs, ours] =
            [&folder, &again].map(|folder| std::fs::read_to_string(folder.join("adapter_config.json")).unwrap());
        assert_eq!(ours, theirs, "{}", folder.display());
        assert_eq!(LoraConfig::from_pretrained(&again).unwrap(), config);
        seen += 1;
    }
    assert!(seen > 35, "{seen} configurations");

    let read = |name: &str| LoraConfig::from_pretrained(dir.join("from_peft").join(name)).unwrap();
    assert_eq!(read("one_layer").layers_to_transform(), [1]);
    assert_eq!(read("layers").layers_pattern(), ["h", "layers"]);
    assert_eq!(read("patterns").rank_pattern().entries().collect::<Vec<_>>(), [("^b.c", 2), ("a", 4)]);
    assert_eq!(read("modules_to_save").modules_to_save(), ["score", "head"]);
    assert_eq!(read("bias_lora_only").bias(), Bias::LoraOnly);
    assert_eq!(read("init_pissa_niter_16").init_lora_weights(), InitLoraWeights::PissaNiter(16));
    assert_eq!(read("all_linear").target_modules(), Some(&TargetModules::AllLinear));
    assert_eq!(read("replication").layer_replication(), [(0, 2), (1, 3)]);
    assert_eq!(read("eva").other("eva_config").unwrap()["rho"], 1.5);
    assert_eq!(read("task").other("task_type").unwrap(), "CAUSAL_LM");
}

/// config_reference.py holds the same configurations, made by PEFT.
#[test]
fn what_the_builder_makes_is_read_by_peft() {
    if python().is_none() {
        return;
    }
    let dir = fresh_dir("config_from_rust");
    let everything = LoraConfig::builder()
        .r(6)
        .lora_alpha(2.5)
        .lora_dropout(0.1)
        .target_modules(["q", "v"])
        .exclude_modules(r"h\.0\..*")
        .layers_to_transform([1, 2])
        .layers_pattern("h")
        .rank_pattern([("b", 2), ("a", 4)])
        .alpha_pattern([("a", 3.0)])
        .modules_to_save(["head"])
        .bias(Bias::LoraOnly)
        .fan_in_fan_out(true)
        .use_rslora(true)
        .use_dora(true)
        .init_lora_weights(InitLoraWeights::PissaNiter(4))
        .trainable_token_indices([("wte", [1, 2])])
        .target_parameters(["e.w"])
        .ensure_weight_tying(true)
        .layer_replication([(0, 2), (1, 3)])
        .task_type("CAUSAL_LM")
        .base_model_name_or_path("org/model");
    everything.build().unwrap().save_pretrained(dir.join("from_rust/everything")).unwrap();
    let bias = LoraConfig::builder().target_modules(r".*\.q").lora_bias(true).init_lora_weights(false);
    let bias = bias.bias(Bias::All).trainable_token_indices([3]).build().unwrap();
    bias.save_pretrained(dir.join("from_rust/bias")).unwrap();
    peer("config_reference.py", &["check".as_ref(), dir.as_os_str()]);
}

#[test]
fn values_out_of_range_and_contradictions_are_refused_by_name() {
    let list = || LoraConfig::builder().target_modules(["q"]);
    let pattern = || LoraConfig::builder().target_modules(".*q");
    let cases: Vec<(&str, LoraConfigBuilder)> = vec![
        ("target_modules", LoraConfig::builder()),
        ("target_modules", LoraConfig::builder().target_modules([""])),
        ("target_modules", LoraConfig::builder().target_modules(Vec::<String>::new())),
        ("r", list().r(0)),
        ("r", list().r(3).init_lora_weights(InitLoraWeights::Orthogonal)),
        ("r", list().r(4).rank_pattern([("q", 5)]).init_lora_weights(InitLoraWeights::Orthogonal)),
        ("lora_alpha", list().lora_alpha(f64::NAN)),
        ("lora_dropout", list().lora_dropout(1.0)),
        ("rank_pattern", list().rank_pattern([("q", 0)])),
        ("rank_pattern", list().rank_pattern([("q", 1), ("q", 2)])),
        ("alpha_pattern", list().alpha_pattern([("q", f64::INFINITY)])),
        ("alpha_pattern", list().alpha_pattern([("", 1.0)])),
        ("exclude_modules", list().exclude_modules("all-linear")),
        ("modules_to_save", list().modules_to_save([""])),
        ("layers_to_transform", pattern().layers_to_transform([1])),
        ("layers_to_transform", LoraConfig::builder().target_modules("all-linear").layers_to_transform(1)),
        ("layers_to_transform", list().layers_to_transform([-1])),
        ("layers_pattern", pattern().layers_pattern("h")),
        ("layers_pattern", list().layers_pattern("h")),
        ("layer_replication", list().layer_replication([(2, 2)])),
        ("trainable_token_indices", list().trainable_token_indices([1, 1])),
        ("trainable_token_indices", list().trainable_token_indices([("wte", [-1])])),
        ("lora_bias", list().lora_bias(true).init_lora_weights(InitLoraWeights::Gaussian)),
        ("lora_bias", list().lora_bias(true).use_dora(true)),
    ];
    for (name, builder) in cases {
        let about = format!("{builder:?}");
        let error = builder.build().expect_err(&about);
        assert!(matches!(&error, Error::Config { field, .. } if field == name), "{name}: {error}");
    }
}

/// A change of any field that training depends on must stop a resume.
#[test]
fn a_difference_in_any_field_is_told_by_name() {
    let base = || LoraConfig::builder().target_modules(["q", "v"]);
    let plain = base().build().unwrap();
    let changed: Vec<(&str, LoraConfigBuilder)> = vec![
        ("r", base().r(4)),
        ("lora_alpha", base().lora_alpha(1.0)),
        ("lora_dropout", base().lora_dropout(0.5)),
        ("target_modules", base().target_modules(["q"])),
        ("exclude_modules", base().exclude_modules(["h.0.q"])),
        ("layers_to_transform", base().layers_to_transform(1)),
        ("rank_pattern", base().rank_pattern([("q", 4)])),
        ("alpha_pattern", base().alpha_pattern([("q", 4.0)])),
        ("modules_to_save", base().modules_to_save(["head"])),
        ("bias", base().bias(Bias::All)),
        ("lora_bias", base().lora_bias(true)),
        ("fan_in_fan_out", base().fan_in_fan_out(true)),
        ("use_rslora", base().use_rslora(true)),
        ("use_dora", base().use_dora(true)),
        ("init_lora_weights", base().init_lora_weights(false)),
        ("trainable_token_indices", base().trainable_token_indices([1])),
        ("target_parameters", base().target_parameters(["w"])),
        ("ensure_weight_tying", base().ensure_weight_tying(true)),
        ("layer_replication", base().layer_replication([(0, 1)])),
    ];
    for (name, builder) in changed {
        let differences = plain.differences(&builder.build().unwrap());
        assert_eq!(differences.len(), 1, "{differences:?}");
        assert!(differences[0].starts_with(&format!("{name}: recorded ")), "{differences:?}");
    }
    let order = LoraConfig::builder().target_modules(["v", "q"]).task_type("CAUSAL_LM").build().unwrap();
    assert!(plain.differences(&order).is_empty(), "neither order nor task change training");
}
