//! Runs that are interrupted and resumed, against runs that aren't.

mod common;

use common::{bits, device, fresh_dir, rng};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tch::nn::{self, ModuleT};
use tch::{Device, Kind, Tensor};
use tch_peft::checkpoint::{latest, verify};
use tch_peft::{
    AdamW, AdapterConfig, Base, Error, LohaConfig, LokrConfig, LoraConfig, LoraConfigBuilder, LoraModel, Optimizer,
    Parts, QuantConfig, ResumePolicy, Run, Sampler, Schedule, Start, clip_grad_norm,
};

fn floats() -> (Kind, Device) {
    (Kind::Float, device())
}
const STEPS: u64 = 12;

/// Dropout of its own, so that more than the adapters draws random numbers.
#[derive(Debug)]
struct Net {
    up: nn::Linear,
    mid: nn::Linear,
    down: nn::Linear,
}

impl ModuleT for Net {
    fn forward_t(&self, x: &Tensor, train: bool) -> Tensor {
        let x = x.apply(&self.up).tanh().dropout(0.1, train);
        x.apply(&self.mid).relu().dropout(0.1, train).apply(&self.down)
    }
}

/// Random weights, the same each time.
fn base(scheme: &str) -> Base<Net> {
    tch::manual_seed(3);
    let vs = nn::VarStore::new(device());
    let linear = |name: &str, inn, out| nn::linear(vs.root() / name, inn, out, Default::default());
    let net = Net { up: linear("up", 32, 80), mid: linear("mid", 80, 70), down: linear("down", 70, 4) };
    let base = Base::new(vs, net);
    if scheme == "dense" { base } else { base.quantize(&quant(scheme)).unwrap() }
}

fn quant(scheme: &str) -> QuantConfig {
    match scheme {
        "int8" => QuantConfig::int8(),
        "nf4" => QuantConfig::nf4(),
        _ => QuantConfig::nf4().double_quant(true),
    }
    .build()
    .unwrap()
}

fn config() -> LoraConfigBuilder {
    LoraConfig::builder().r(4).lora_alpha(8.0).lora_dropout(0.2).target_modules(["up", "mid", "down"])
}

/// Everything that a training program builds before it calls `resume_or_start`.
struct Trainer {
    model: LoraModel<Net>,
    optimizer: AdamW,
    schedule: Schedule,
    sampler: Sampler,
    run: Run,
}

impl Trainer {
    fn new(base: Base<Net>, config: LoraConfigBuilder, run: Run) -> Self {
        Self::with(base, config.build().unwrap(), run)
    }

    fn with(base: Base<Net>, config: impl Into<AdapterConfig>, run: Run) -> Self {
        common::repeatable();
        tch::manual_seed(11);
        let model = LoraModel::wrap(base, config).unwrap();
        let optimizer =
            AdamW::builder().lr(1e-2).group(|name| name.contains("lora_B") || name.ends_with("_b"), 3e-2, 0.0);
        let optimizer = optimizer.build(model.trainable_parameters()).unwrap();
        let sampler = Sampler::new(50, 8, 5).unwrap();
        Trainer { model, optimizer, schedule: Schedule::cosine(2, STEPS), sampler, run }
    }

    fn start(&mut self) -> tch_peft::Result<Start> {
        let Trainer { model, optimizer, schedule, sampler, run } = self;
        run.resume_or_start(&mut Parts::new(model, optimizer, schedule, sampler))
    }

    /// Trains up to the step; answers each loss's bits.
    fn train(&mut self, until: u64) -> BTreeMap<u64, u32> {
        let (images, labels) = data();
        let mut losses = BTreeMap::new();
        while self.run.current_step() < until {
            let rows: Vec<i64> = self.sampler.next_batch().into_iter().map(|row| row as i64).collect();
            let rows = Tensor::from_slice(&rows).to_device(device());
            let output = self.model.forward(&images.index_select(0, &rows)).unwrap();
            let loss = output.cross_entropy_for_logits(&labels.index_select(0, &rows));
            losses.insert(self.run.current_step() + 1, f32::try_from(&loss).unwrap().to_bits());
            loss.backward();
            clip_grad_norm(&self.model.trainable_parameters(), 1.0).unwrap();
            self.optimizer.step().unwrap();
            self.optimizer.zero_grad().unwrap();
            let Trainer { model, optimizer, schedule, sampler, run } = self;
            run.step(&mut Parts::new(model, optimizer, schedule, sampler)).unwrap();
        }
        losses
    }

    fn adapter(&self) -> BTreeMap<String, Vec<u8>> {
        self.model.parameters().into_iter().map(|p| (p.name, bits(&p.tensor))).collect()
    }
}

/// Examples, drawn by a generator that is no part of the run.
fn data() -> (Tensor, Tensor) {
    let numbers = Tensor::arange(50 * 32, floats());
    let images = (numbers * 12.9898).sin().view([50, 32]);
    let labels = Tensor::arange(50, (Kind::Int64, device())).remainder(4);
    (images, labels)
}

fn run(dir: &Path) -> Run {
    Run::builder(dir).every(2).keep(3).build().unwrap()
}

/// Their dropouts draw for each layer of each pass, and a dropped layer has no gradient.
#[test]
fn other_kinds_of_adapters_resume_to_the_bit_too() {
    let _rng = rng();
    let targets = ["up", "mid", "down"];
    let loha = LohaConfig::builder().r(4).rank_dropout(0.2).module_dropout(0.2).target_modules(targets);
    let lokr = LokrConfig::builder().r(2).rank_dropout(0.2).module_dropout(0.2).target_modules(targets);
    let configs: [AdapterConfig; 2] = [loha.build().unwrap().into(), lokr.build().unwrap().into()];
    for config in configs {
        let dir = fresh_dir(&format!("resume-{}", config.peft_type()));
        let mut straight = Trainer::with(base("nf4"), config.clone(), run(&dir.join("straight")));
        straight.start().unwrap();
        let losses = straight.train(STEPS);
        let mut again = BTreeMap::new();
        for until in [5, STEPS] {
            let mut part = Trainer::with(base("nf4"), config.clone(), run(&dir.join("interrupted")));
            part.start().unwrap();
            again.extend(part.train(until));
            if until == STEPS {
                assert_eq!(part.adapter(), straight.adapter(), "{}", config.peft_type());
            }
        }
        assert_eq!(again, losses, "{}", config.peft_type());
        let mut other = Trainer::new(base("nf4"), self::config(), run(&dir.join("interrupted")));
        let error = other.start().unwrap_err();
        assert!(matches!(&error, Error::DifferentConfig { .. }), "{error}");
    }
}

#[test]
fn an_interrupted_run_takes_the_same_steps_to_the_bit() {
    let _rng = rng();
    for scheme in ["dense", "int8", "nf4", "nf4+dq"] {
        let dir = fresh_dir(&format!("resume-{scheme}"));
        let mut straight = Trainer::new(base(scheme), config(), run(&dir.join("straight")));
        assert_eq!(straight.start().unwrap(), Start::Fresh);
        let losses = straight.train(STEPS);

        let folder = dir.join("interrupted");
        let mut again = BTreeMap::new();
        let mut last = None;
        // Saves are at even steps: those in between are done again.
        for (until, resumed) in [(3, 0), (4, 2), (9, 4), (STEPS, 8)] {
            drop(last.take());
            let mut part = Trainer::new(base(scheme), config(), run(&folder));
            // What a resumed process has drawn before doesn't matter.
            if resumed > 0 {
                let _ = Tensor::randn([7], floats());
            }
            part.start().unwrap();
            assert_eq!(part.run.current_step(), resumed, "{scheme}");
            for (step, loss) in part.train(until) {
                assert_eq!(*again.entry(step).or_insert(loss), loss, "{scheme}: step {step} done again");
            }
            last = Some(part);
        }
        assert_eq!(again, losses, "{scheme}: losses");
        assert_eq!(last.unwrap().adapter(), straight.adapter(), "{scheme}: adapter");
        let [a, b] = ["straight", "interrupted"].map(|name| {
            let (path, _) = latest(dir.join(name)).unwrap().found.unwrap();
            let files = verify(&path).unwrap().files;
            (path, files)
        });
        assert_eq!(a.1, b.1, "{scheme}: the last checkpoints of {:?} and {:?} are the same files", a.0, b.0);
    }
}

#[test]
fn quantising_before_or_after_wrapping_resumes_the_other() {
    let _rng = rng();
    for scheme in ["int8", "nf4+dq"] {
        let dir = fresh_dir(&format!("resume-order-{scheme}"));
        let wrapped_first = |dir: &Path| {
            let mut trainer = Trainer::new(base("dense"), config(), run(dir));
            trainer.model.quantize(&quant(scheme)).unwrap();
            trainer
        };
        let mut straight = wrapped_first(&dir.join("straight"));
        straight.start().unwrap();
        straight.train(STEPS);
        let mut first = Trainer::new(base(scheme), config(), run(&dir.join("mixed")));
        first.start().unwrap();
        first.train(6);
        drop(first);
        let mut second = wrapped_first(&dir.join("mixed"));
        second.start().unwrap();
        assert_eq!(second.run.current_step(), 6);
        second.train(STEPS);
        assert_eq!(second.adapter(), straight.adapter(), "{scheme}");
    }
}

/// A run of four steps over nf4.
fn four_steps(name: &str) -> PathBuf {
    let dir = fresh_dir(name);
    let mut first = Trainer::new(base("nf4"), config(), run(&dir));
    first.start().unwrap();
    first.train(4);
    dir
}

/// What must be as it was after a refusal.
fn parts_of(trainer: &Trainer) -> (BTreeMap<String, Vec<u8>>, String, String) {
    let state = trainer.optimizer.export_state().unwrap();
    let tensors: BTreeMap<_, _> = state.tensors.iter().map(|(name, t)| (name.clone(), bits(t))).collect();
    let generator = tch_peft::RngState::capture(&[]).unwrap();
    (
        trainer.adapter(),
        format!("{tensors:?} {:?}", trainer.sampler.state()),
        serde_json::to_string(&generator).unwrap(),
    )
}

fn refused(mut trainer: Trainer) -> Error {
    let before = parts_of(&trainer);
    let error = trainer.start().expect_err("it must be refused");
    assert!(parts_of(&trainer) == before, "refused, but something changed: {error}");
    error
}

#[test]
fn another_base_is_refused_with_its_weights_and_the_ways_on() {
    let _rng = rng();
    let dir = four_steps("resume-other-base");
    for (other, line) in [
        ("int8", "up.weight: expected nf4, found int8"),
        ("nf4+dq", "up.weight: expected nf4, found nf4+dq"),
        ("dense", "up.weight: expected nf4, found dense"),
    ] {
        let error = refused(Trainer::new(base(other), config(), run(&dir)));
        let Error::DifferentBase { differences } = &error else { panic!("{error}") };
        assert_eq!(differences.len(), 3, "{differences:?}");
        assert!(differences.iter().any(|d| d == line), "{differences:?}");
        let text = error.to_string();
        for way in ["quantise the base as recorded", "AllowDifferentBase", "init_lora"] {
            assert!(text.contains(way), "{text}");
        }
    }
    // One value of one bias.
    let changed = base("nf4");
    let bias = changed.module().mid.bs.as_ref().unwrap();
    tch::no_grad(|| drop(bias.get(0).f_add_scalar_(1e-3).unwrap()));
    let error = refused(Trainer::new(changed, config(), run(&dir)));
    let Error::DifferentBase { differences } = &error else { panic!("{error}") };
    assert_eq!(differences, &["mid.bias: same shape and scheme, other values"]);

    // Asked for, it is allowed, and recorded in what follows.
    let policy = Run::builder(&dir).every(2).policy(ResumePolicy::AllowDifferentBase).build().unwrap();
    let mut allowed = Trainer::new(base("int8"), config(), policy);
    allowed.start().unwrap();
    allowed.train(6);
    let (path, _) = latest(&dir).unwrap().found.unwrap();
    let text = std::fs::read_to_string(path.join("base.json")).unwrap();
    let record: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(record["allowed_changes"][0]["step"], 4);
    assert_eq!(record["allowed_changes"][0]["differences"].as_array().unwrap().len(), 3);

    // And a new run can begin from the adapter alone.
    let warm = LoraModel::init_lora(base("int8"), &path).unwrap();
    let values: BTreeMap<_, _> = warm.parameters().into_iter().map(|p| (p.name, bits(&p.tensor))).collect();
    assert_eq!(values, allowed.adapter());
}

#[test]
fn another_configuration_is_refused_with_its_fields() {
    let _rng = rng();
    let dir = four_steps("resume-other-config");
    for (other, lines) in [
        (config().r(2), vec!["r: recorded 4, given 2"]),
        (
            config().lora_alpha(16.0).lora_dropout(0.1),
            vec!["lora_alpha: recorded 8, given 16", "lora_dropout: recorded 0.2, given 0.1"],
        ),
        (config().use_rslora(true), vec!["use_rslora: recorded false, given true"]),
    ] {
        let error = refused(Trainer::new(base("nf4"), other, run(&dir)));
        let Error::DifferentConfig { what, differences } = &error else { panic!("{error}") };
        assert_eq!(what, "LoRA configuration");
        assert_eq!(differences, &lines);
        assert!(error.to_string().contains("init_lora"), "{error}");
    }
    let error = refused(Trainer::new(base("nf4"), config().target_modules(["up", "mid"]), run(&dir)));
    assert!(error.to_string().contains("target_modules: recorded "), "{error}");

    let mut other = Trainer::new(base("nf4"), config(), run(&dir));
    other.optimizer = AdamW::builder().lr(2e-2).build(other.model.trainable_parameters()).unwrap();
    assert!(matches!(refused(other), Error::DifferentConfig { what, .. } if what == "optimizer"));
    let mut other = Trainer::new(base("nf4"), config(), run(&dir));
    other.schedule = Schedule::cosine(2, STEPS + 1);
    assert!(matches!(refused(other), Error::DifferentConfig { what, .. } if what == "schedule"));
    let mut other = Trainer::new(base("nf4"), config(), run(&dir));
    other.sampler = Sampler::new(50, 4, 5).unwrap();
    assert!(matches!(refused(other), Error::DifferentConfig { what, .. } if what == "sampler"));
}

#[test]
fn a_damaged_checkpoint_is_told_and_the_one_before_it_is_used() {
    let _rng = rng();
    let dir = four_steps("resume-damaged");
    let newest = dir.join("checkpoint-00000004");
    let file = newest.join("optimizer.safetensors");
    let whole = std::fs::read(&file).unwrap();
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    for damaged in [&flipped[..], &whole[..whole.len() - 1], &[]] {
        std::fs::write(&file, damaged).unwrap();
        let mut trainer = Trainer::new(base("nf4"), config(), run(&dir));
        let Start::Resumed { step, path, skipped, .. } = trainer.start().unwrap() else { panic!("started anew") };
        assert_eq!((step, path), (2, dir.join("checkpoint-00000002")));
        assert_eq!(skipped.len(), 1);
        assert_eq!(skipped[0].path, newest);
        assert!(skipped[0].reason.contains("optimizer.safetensors"), "{}", skipped[0].reason);
    }
    // With every one of them damaged, a run doesn't silently begin anew.
    std::fs::remove_file(dir.join("checkpoint-00000002/base.json")).unwrap();
    let error = refused(Trainer::new(base("nf4"), config(), run(&dir)));
    assert!(matches!(&error, Error::NoCheckpoint { reasons, .. } if reasons.len() == 2), "{error}");
}

#[test]
fn old_checkpoints_go_and_the_newest_stay() {
    let _rng = rng();
    let dir = fresh_dir("resume-rotation");
    let mut trainer = Trainer::new(base("int8"), config(), run(&dir));
    trainer.start().unwrap();
    std::fs::create_dir(dir.join("checkpoint-old")).unwrap();
    trainer.train(STEPS);
    let mut names: Vec<_> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("checkpoint"))
        .collect();
    names.sort();
    assert_eq!(names, ["checkpoint-00000008", "checkpoint-00000010", "checkpoint-00000012", "checkpoint-old"]);
    // A second run may not write into the same folder meanwhile.
    let mut second = Trainer::new(base("int8"), config(), run(&dir));
    assert!(matches!(second.start(), Err(Error::RunInUse { .. })));
}
