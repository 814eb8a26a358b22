//! What the child processes do: fine-tune an adapter, or judge one.

use crate::args::Job;
use crate::data::{self, Text};
use crate::losses::Writer;
use crate::model::Llama;
use crate::{Result, base};
use serde::{Deserialize, Serialize};
use std::path::Path;
use tch_peft::{
    AdamW, Base, LoraConfig, LoraModel, Optimizer, Parts, QuantConfig, Run, Sampler, Schedule, Start, clip_grad_norm,
};

const BATCH: usize = 8;

/// What a child tells its parent, one line of JSON each.
#[derive(Debug, Serialize, Deserialize)]
pub enum Message {
    /// Training goes on after so many steps, 0 for a fresh start.
    Started { step: u64, checkpoints_skipped: usize },
    /// Training is over and the adapter saved.
    Trained { weight_bytes: [usize; 2], base_loss: f64, tuned_loss: f64 },
    /// The adapter was loaded and judged.
    Evaluated { loss: f64 },
}

impl Message {
    fn tell(&self) -> Result<()> {
        println!("{}", serde_json::to_string(self)?);
        Ok(())
    }
}

/// Fine-tunes from the beginning, or from where a killed process left off: the
/// same code and the same command.
pub fn train(job: &Job) -> Result<()> {
    let base = quantized_base(job)?;
    let weight_bytes = [base.quantization_report().bytes_before(), base.quantization_report().bytes_after()];
    let config = LoraConfig::builder()
        .r(8)
        .lora_alpha(16.0)
        .lora_dropout(0.05)
        .target_modules(["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
        .build()?;
    tch::manual_seed(job.seed as i64);
    let mut model = LoraModel::wrap(base, config)?;

    let text = Text::new(data::TUNING_TEXT);
    let mut sampler = Sampler::new(text.len(), BATCH, job.seed)?.drop_last(true);
    let mut optimizer = AdamW::builder().lr(4e-3).build(model.trainable_parameters())?;
    let schedule = Schedule::cosine(job.steps / 10, job.steps);
    let mut run = Run::builder(&job.dir).every(job.every).keep(2).build()?;

    let start = run.resume_or_start(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler))?;
    let checkpoints_skipped = match start {
        Start::Fresh => 0,
        Start::Resumed { skipped, .. } => skipped.len(),
    };
    Message::Started { step: run.current_step(), checkpoints_skipped }.tell()?;

    let mut losses = Writer::open(&job.dir)?;
    while run.current_step() < job.steps {
        let loss = data::loss(&text.batch(&sampler.next_batch()), |x| model.forward(x))?;
        losses.append(run.current_step() + 1, f32::try_from(&loss)?)?;
        loss.f_backward()?;
        clip_grad_norm(&model.trainable_parameters(), 1.0)?;
        optimizer.step()?;
        optimizer.zero_grad()?;
        run.step(&mut Parts::new(&mut model, &mut optimizer, &schedule, &mut sampler))?;
    }

    model.save_pretrained(job.adapter())?;
    model.eval()?;
    let tuned_loss = text.held_out_loss(|x| model.forward(x))?;
    let _off = model.disable_adapters();
    let base_loss = text.held_out_loss(|x| model.forward(x))?;
    Message::Trained { weight_bytes, base_loss, tuned_loss }.tell()
}

/// Loads base and adapter, as a program that serves the model would.
pub fn evaluate(job: &Job) -> Result<()> {
    let model = LoraModel::from_pretrained(quantized_base(job)?, job.adapter())?;
    let loss = Text::new(data::TUNING_TEXT).held_out_loss(|x| model.forward(x))?;
    Message::Evaluated { loss }.tell()
}

fn quantized_base(job: &Job) -> Result<Base<Llama>> {
    let config = match job.scheme.as_str() {
        "nf4" => QuantConfig::nf4().double_quant(true),
        "int8" => QuantConfig::int8(),
        other => return Err(format!("no scheme {other}").into()),
    };
    let (vs, net) = base::load(Path::new(&job.base))?;
    Ok(Base::new(vs, net).quantize(&config.skip(["lm_head"]).build()?)?)
}
