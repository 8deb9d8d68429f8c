use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use serde::Serialize;

use super::{
    Answer,
    data::DataArgs,
    env::Env,
    failure::{CliError, CliResult, Hint},
    gpu::OnDevice,
    merge::parse_input,
    page::{Page, Table, count, number, percent},
};
use crate::{
    adapter::{Adapter, AdapterError},
    checkpoint::{Checkpoint, Context, Printable, probe},
    data::{self, BatchLimits, Batches, DataReport, Dataset, Question, ReadOptions, Task, Template, Tokenizer},
    error::{ErrorKind, Failure},
    train::{self, CpuDevice, Device, EvalSize, GenerateOptions, Keep, MemoryEstimate, Model, Workspace},
};

/// Evaluate a model on a file of rows: loss, and the share of right answers
///
/// The loss is the mean over the tokens of the responses. For commonsense files (instructions that end with "Answer format: a/b/...") the
/// possible answers are ranked too: the answer is right if "the correct answer is ..." is most likely with it. A --template file that
/// writes the answer itself, in {% generation %}, is rendered for each possible answer, and the rendered texts are ranked. With --generate
/// the model writes its answers, greedily, and they are judged by the published rules of the commonsense and arithmetic tasks, or
/// compared with the answer that such a template writes. With --adapter the weights are those that `merge` would write; no file is written.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct EvalArgs {
    /// Folder of the checkpoint, with its tokenizer.json
    base: PathBuf,
    /// Adapter made from that base; =SCALE replaces its own scale [default: none]
    #[arg(short, long, value_name = "FILE[=SCALE]")]
    adapter: Option<String>,
    /// File of rows: a JSON array or JSON lines
    #[arg(long, value_name = "FILE")]
    data: PathBuf,
    /// Task of the rows
    #[arg(long, value_enum, default_value_t = TaskChoice::Auto)]
    task: TaskChoice,
    /// Number of rows to use, from the first [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    #[command(flatten)]
    rows: DataArgs,
    /// Number of tokens of a batch; more tokens need more memory
    #[arg(long, value_name = "N", default_value_t = 2048, value_parser = parse_batch_tokens)]
    batch_tokens: usize,
    /// Let the model write its answers, and judge them
    #[arg(long)]
    generate: bool,
    /// Maximum length of a written answer in tokens [default: 32 for commonsense, 512 for math]
    #[arg(long, value_name = "N", requires = "generate", value_parser = clap::value_parser!(u32).range(1..))]
    max_new_tokens: Option<u32>,
    /// List all questions with the model's answers
    #[arg(long)]
    answers: bool,
    /// Show the first N rows as the model sees them, learned tokens in ⟦ ⟧, and stop [N without a value: 3]
    #[arg(long, value_name = "N", num_args = 0..=1, default_missing_value = "3", conflicts_with_all = ["generate", "answers", "adapter"])]
    show: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum TaskChoice {
    /// Decided by the first row
    Auto,
    /// One of the answers listed in the instruction
    Commonsense,
    /// A number, or a letter from A to E
    Math,
    /// Loss only
    Loss,
}

fn parse_batch_tokens(text: &str) -> Result<usize, String> {
    text.parse().ok().filter(|n| (1..=1 << 24).contains(n)).ok_or_else(|| "expected a number of tokens".to_owned())
}

/// Measurements of a model on a file.
#[derive(Serialize)]
struct EvalReport {
    base: String,
    adapter: Option<AdapterReport>,
    data: DataReport,
    task: &'static str,
    loss: f64,
    perplexity: f64,
    ranked: Option<Ranked>,
    generated: Option<Score>,
    answers: Option<Vec<AnswerReport>>,
}

#[derive(Serialize)]
struct AdapterReport {
    name: String,
    id: String,
    scale: f64,
    n_deltas: u64,
}

#[derive(Serialize)]
struct Score {
    n_questions: u64,
    n_right: u64,
    accuracy: f64,
}

impl Score {
    fn of(right: impl ExactSizeIterator<Item = bool>) -> Self {
        let n_questions = right.len() as u64;
        let n_right = right.filter(|&right| right).count() as u64;
        Self { n_questions, n_right, accuracy: n_right as f64 / n_questions as f64 }
    }
}

/// Accuracy of the most likely answers.
#[derive(Serialize)]
struct Ranked {
    #[serde(flatten)]
    score: Score,
    /// Accuracy of guessing: the mean of 1 / number of answers.
    chance: f64,
    /// The same by list of possible answers, in order of appearance; empty if there are too many lists for a table.
    kinds: Vec<RankedKind>,
}

#[derive(Serialize)]
struct RankedKind {
    /// What there was to choose from, as `a/b/…`.
    answers: String,
    #[serde(flatten)]
    score: Score,
    chance: f64,
}

impl Ranked {
    /// Maximum number of kinds in the table.
    const MAX_KINDS: usize = 20;

    fn of(questions: &[Question], chosen: &[&str]) -> Self {
        let mut kinds: Vec<(String, usize, Vec<bool>)> = Vec::new();
        let (mut right, mut chances) = (Vec::new(), 0.0);
        for (question, chosen) in questions.iter().zip(chosen) {
            let is_right = question.answer == *chosen;
            right.push(is_right);
            chances += 1.0 / question.candidates.len() as f64;
            let names: Vec<&str> = question.candidates.iter().map(|(name, _)| name.as_str()).collect();
            let answers = names.join("/");
            match kinds.iter().position(|(kind, ..)| *kind == answers) {
                Some(kind) => kinds[kind].2.push(is_right),
                // One more than the maximum marks an overflow.
                None if kinds.len() <= Self::MAX_KINDS => kinds.push((answers, names.len(), vec![is_right])),
                None => {}
            }
        }
        if kinds.len() > Self::MAX_KINDS {
            kinds.clear();
        }
        let kind = |(answers, n, right): (String, usize, Vec<bool>)| RankedKind {
            answers,
            score: Score::of(right.into_iter()),
            chance: 1.0 / n as f64,
        };
        let chance = chances / questions.len() as f64;
        Self { score: Score::of(right.into_iter()), chance, kinds: kinds.into_iter().map(kind).collect() }
    }
}

#[derive(Serialize)]
struct AnswerReport {
    expected: String,
    ranked: Option<String>,
    generated: Option<String>,
    is_right: bool,
}

const EXAMPLES: &str = "\
Examples:
  neuroada-ckpt eval llama --data train.json --show 3
  neuroada-ckpt eval llama --data validation.jsonl --limit 500
  neuroada-ckpt eval llama --adapter adapter.safetensors --data gsm8k.jsonl --generate";

pub(super) fn run(args: EvalArgs, env: &Env) -> CliResult<Answer> {
    let ctx = env.context();
    probe::existing(&args.base)?;
    let tokenizer = Tokenizer::open(&args.base).hint("eval reads tokenizer.json in the checkpoint's folder")?;
    let mut options = args.rows.options(args.show.or(args.limit))?;
    if let Some(n_shown) = args.show {
        return show(env, &tokenizer, &args.data, &options, n_shown);
    }
    let base = Checkpoint::open(&args.base)?;
    if args.adapter.is_some() {
        base.refuse_codes()?;
    }
    let adapter = args.adapter.as_deref().map(|text| open_adapter(text, &base, &ctx)).transpose()?;
    let task = match args.task {
        TaskChoice::Auto => data::task_of(&args.data)?,
        TaskChoice::Commonsense => Some(Task::Commonsense),
        TaskChoice::Math => Some(Task::Math),
        TaskChoice::Loss => None,
    };
    if task.is_none() && (args.generate || args.answers) {
        return Err(CliError::usage("--generate and --answers need rows with answers; --task commonsense or math"));
    }
    if let Some(task) = task
        && options.template == Template::Auto
    {
        options.template = if task == Task::Commonsense { Template::Commonsense } else { Template::Alpaca };
    }
    let (dataset, data) = super::data::read(env, &args.data, &tokenizer, &options)?;
    let asks = task.filter(|&task| args.generate || task == Task::Commonsense);
    let questions = match asks {
        Some(task) => data::read_questions(&ctx, &args.data, &tokenizer, task, &options)?,
        None => Vec::new(),
    };

    let wanted = Wanted {
        base: &base,
        adapter: adapter.as_ref(),
        dataset: &dataset,
        questions: &questions,
        tokenizer: &tokenizer,
        task,
        generate: args.generate.then(|| GenerateOptions {
            max_new_tokens: args.max_new_tokens.map_or(task.map_or(0, Task::max_new_tokens), |n| n as usize),
            stop: tokenizer.stops().to_vec(),
            max_tokens: args.batch_tokens,
        }),
        max_tokens: args.batch_tokens,
    };
    let Measured { loss, chosen, written } = wanted.measure_somewhere(env)?;

    let is_right = |i: usize, question: &Question| match (&written, &chosen, task) {
        (Some(written), _, Some(task)) => question.is_right(task, &written[i]),
        (_, Some(chosen), _) => *chosen[i] == question.answer,
        _ => false,
    };
    let answers = args.answers.then(|| {
        let report = |(i, question): (usize, &Question)| AnswerReport {
            expected: question.answer.clone(),
            ranked: chosen.as_ref().map(|chosen| chosen[i].to_owned()),
            generated: written.as_ref().map(|written| written[i].clone()),
            is_right: is_right(i, question),
        };
        questions.iter().enumerate().map(report).collect()
    });
    let ranked = chosen.as_ref().map(|chosen| Ranked::of(&questions, chosen));
    let generated = written.as_ref().map(|_| Score::of(questions.iter().enumerate().map(|(i, q)| is_right(i, q))));
    let report = EvalReport {
        base: base.name(),
        adapter: adapter.map(|(adapter, scale)| report_of(env, &adapter, scale)).transpose()?,
        data,
        task: task.map_or("loss", |task| if task == Task::Commonsense { "commonsense" } else { "math" }),
        loss,
        perplexity: loss.exp(),
        ranked,
        generated,
        answers,
    };
    env.report(&report, print)?;
    if task == Some(Task::Math) && !args.generate {
        env.note("note: answers to math are not ranked; --generate lets the model write them");
    }
    Ok(Answer::Yes)
}

fn open_adapter(text: &str, base: &Checkpoint, ctx: &Context<'_>) -> CliResult<(Adapter, f64)> {
    let input = parse_input(text)?;
    let adapter = match Adapter::open_with_base(ctx, &input.adapter, base) {
        Err(e @ AdapterError::WrongBase { .. }) => Err(e).hint("evaluate it on the checkpoint it was made from")?,
        Err(e) if e.kind() == ErrorKind::BadInput => Err(e).hint("adapters of other kinds can be merged first")?,
        adapter => adapter?,
    };
    let scale = input.scale.unwrap_or(adapter.scale());
    Ok((adapter, scale))
}

fn report_of(env: &Env, adapter: &Adapter, scale: f64) -> CliResult<AdapterReport> {
    let name = adapter.path().file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(AdapterReport { name, id: adapter.id(&env.context())?.to_string(), scale, n_deltas: adapter.nnz() })
}

/// A request: the model, the rows and the measurements.
struct Wanted<'a> {
    base: &'a Checkpoint,
    adapter: Option<&'a (Adapter, f64)>,
    dataset: &'a Dataset,
    questions: &'a [Question],
    tokenizer: &'a Tokenizer,
    task: Option<Task>,
    /// Set if the model writes its answers.
    generate: Option<GenerateOptions>,
    max_tokens: usize,
}

struct Measured<'a> {
    loss: f64,
    /// The most likely candidate of each question.
    chosen: Option<Vec<&'a str>>,
    /// The model's text for each question.
    written: Option<Vec<String>>,
}

/// The work of a request, on any device.
struct Measuring<'w, 'a> {
    wanted: &'w Wanted<'a>,
    env: &'w Env,
}

impl<'a> OnDevice for Measuring<'_, 'a> {
    type Output = Measured<'a>;

    fn run<D: Device>(self, device: &D) -> CliResult<Measured<'a>> {
        self.wanted.measure(self.env, device)
    }
}

impl<'a> Wanted<'a> {
    /// Measures on the device that `--device` names.
    fn measure_somewhere(&self, env: &Env) -> CliResult<Measured<'a>> {
        let work = Measuring { wanted: self, env };
        if let Some(gpu) = env.gpu()? {
            let dtype = gpu.dtype_of(self.base).hint("--device cpu supports them")?;
            return gpu.run(dtype, work);
        }
        super::data::check_memory(env, self.base.root(), "evaluation", self.memory()?.total)?;
        work.run(&CpuDevice::new())
    }

    /// Memory of the evaluation on the CPU.
    fn memory(&self) -> CliResult<MemoryEstimate> {
        let config = train::check_model(self.base)?;
        let batches = Batches::in_order(self.dataset, self.limits());
        let supervised = |i| batches.examples(i).iter().map(|&i| self.dataset.example(i as usize).n_supervised()).sum();
        let mut size = EvalSize {
            max_tokens: batches.max_tokens(),
            max_supervised: (0..batches.len()).map(supervised).max().unwrap_or(0),
            n_cached: 0,
        };
        if self.task == Some(Task::Commonsense) {
            size = size.max(EvalSize::of_ranking(&self.asked(), self.max_tokens));
        }
        if let Some(options) = self.generate.as_ref().filter(|_| self.task.is_some()) {
            size = size.max(EvalSize::of_answers(&self.prompts(), options));
        }
        Ok(MemoryEstimate::of_eval(&config, self.base, size))
    }

    fn limits(&self) -> BatchLimits {
        BatchLimits { max_tokens: self.max_tokens, max_examples: usize::MAX }
    }

    /// Questions as token ids.
    fn asked(&self) -> Vec<train::Question> {
        let tokens = |question: &Question| train::Question {
            prompt: question.prompt.clone(),
            candidates: question.candidates.iter().map(|(_, tokens)| tokens.clone()).collect(),
        };
        self.questions.iter().map(tokens).collect()
    }

    fn prompts(&self) -> Vec<Vec<u32>> {
        self.questions.iter().map(|question| question.prompt.clone()).collect()
    }

    fn measure<D: Device>(&self, env: &Env, device: &D) -> CliResult<Measured<'a>> {
        let ctx = env.context();
        let mut model = Model::load(&ctx, device, self.base)?;
        if let Some((adapter, scale)) = self.adapter {
            let applied = model.apply(&ctx, device, self.base, adapter, *scale);
            applied.hint("evaluate it on the checkpoint it was made from")?;
        }
        let loss = self.loss(env, device, &model)?;
        let is_ranked = self.task == Some(Task::Commonsense);
        let chosen = is_ranked.then(|| self.rank(env, device, &model)).transpose()?;
        let options = self.generate.as_ref().filter(|_| self.task.is_some());
        let written = options.map(|options| self.write(env, device, &model, options)).transpose()?;
        Ok(Measured { loss, chosen, written })
    }

    fn loss<D: Device>(&self, env: &Env, device: &D, model: &Model<D>) -> CliResult<f64> {
        let ctx = env.context();
        let batches = Batches::in_order(self.dataset, self.limits());
        let mut work = Workspace::new(device, &model.config, batches.max_tokens(), Keep::Nothing)?;
        ctx.observer.begin_count("loss", "tokens", self.dataset.n_tokens());
        Ok(train::mean_loss(&ctx, device, model, batches.iter_from(0), &mut work)?.loss)
    }

    /// The most likely candidate of each question; the first of equally likely ones.
    fn rank<D: Device>(&self, env: &Env, device: &D, model: &Model<D>) -> CliResult<Vec<&'a str>> {
        let ctx = env.context();
        ctx.observer.begin_count("ranking", "questions", self.questions.len() as u64);
        let ranked = train::rank(&ctx, device, model, &self.asked(), self.max_tokens)?;
        let likeliest = |(question, ranked): (&'a Question, Vec<f64>)| {
            let mut best = 0;
            for i in 1..ranked.len() {
                if ranked[i] > ranked[best] {
                    best = i;
                }
            }
            question.candidates[best].0.as_str()
        };
        Ok(self.questions.iter().zip(ranked).map(likeliest).collect())
    }

    fn write<D: Device>(
        &self,
        env: &Env,
        device: &D,
        model: &Model<D>,
        options: &GenerateOptions,
    ) -> CliResult<Vec<String>> {
        let ctx = env.context();
        ctx.observer.begin_count("answering", "questions", self.questions.len() as u64);
        let written = train::generate(&ctx, device, model, &self.prompts(), options)?;
        Ok(written.iter().map(|tokens| self.tokenizer.decode(tokens)).collect::<Result<_, _>>()?)
    }
}

/// One row as the model sees it.
#[derive(Serialize)]
struct Shown {
    tokens: Vec<u32>,
    /// Begin and end of each learned run of tokens.
    learned: Vec<(u32, u32)>,
    text: String,
}

fn show(env: &Env, tokenizer: &Tokenizer, path: &Path, options: &ReadOptions, n: u64) -> CliResult<Answer> {
    let (dataset, data) = super::data::read(env, path, tokenizer, options)?;
    let mut examples = Vec::new();
    for example in dataset.iter().take(n as usize) {
        let (mut text, mut at) = (String::new(), 0);
        for &(begin, end) in example.spans {
            let (begin, end) = (begin as usize, end as usize);
            text += &tokenizer.decode_all(&example.tokens[at..begin])?;
            text += &format!("⟦{}⟧", tokenizer.decode_all(&example.tokens[begin..end])?);
            at = end;
        }
        text += &tokenizer.decode_all(&example.tokens[at..])?;
        examples.push(Shown { tokens: example.tokens.to_vec(), learned: example.spans.to_vec(), text });
    }
    #[derive(Serialize)]
    struct Report {
        data: DataReport,
        examples: Vec<Shown>,
    }
    env.report(&Report { data, examples }, |report, page| {
        for shown in &report.examples {
            let learned: u32 = shown.learned.iter().map(|(begin, end)| end - begin).sum();
            page.line(format_args!("{} tokens, {learned} of them learned:", shown.tokens.len()));
            shown.text.lines().for_each(|line| page.line(format_args!("  {}", Line(line))));
            page.blank();
        }
    })?;
    Ok(Answer::Yes)
}

/// A whole line of text from a file, control bytes escaped.
struct Line<'a>(&'a str);

impl std::fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let chars: Vec<char> = self.0.chars().collect();
        chars.chunks(100).try_for_each(|part| write!(f, "{}", Printable(&part.iter().collect::<String>())))
    }
}

fn print(report: &EvalReport, page: &mut Page) {
    if let Some(answers) = &report.answers {
        let mut table = Table::new(["expected", "ranked", "generated", "right"]);
        for answer in answers {
            let or_dash = |text: &Option<String>| text.as_deref().map_or("-", str::trim).to_owned();
            let right = if answer.is_right { "yes" } else { "no" }.to_owned();
            table.row([answer.expected.clone(), or_dash(&answer.ranked), or_dash(&answer.generated), right]);
        }
        page.table(table);
        page.blank();
    }
    let data = &report.data;
    let mut facts = vec![("model", Printable(&report.base).to_string())];
    if let Some(adapter) = &report.adapter {
        facts.push(("adapter", format!("{}, {} deltas", Printable(&adapter.name), count(adapter.n_deltas))));
    }
    facts.push(("rows", format!("{} of {}, as {}", count(data.n_rows), Printable(&data.name), data.form)));
    facts.push(("tokens", format!("{}, {} of them in responses", count(data.n_tokens), count(data.n_supervised))));
    facts.push(("loss", format!("{} per token, perplexity {}", number(report.loss), number(report.perplexity))));
    let score = |score: &Score| {
        let (right, all) = (score.n_right, score.n_questions);
        format!("{} right: {} of {}", percent(right, all), count(right), count(all))
    };
    if let Some(ranked) = &report.ranked {
        facts.push(("ranked", format!("{}; guessing {}", score(&ranked.score), share(ranked.chance))));
    }
    if let Some(generated) = &report.generated {
        facts.push(("generated", score(generated)));
    }
    page.facts(&facts);
    let kinds = report.ranked.as_ref().map_or(&[][..], |ranked| &ranked.kinds);
    if kinds.len() > 1 {
        let mut table = Table::new(["answers", "questions>", "right>", "guessing>"]);
        for RankedKind { answers, score, chance } in kinds {
            let right = percent(score.n_right, score.n_questions);
            table.row([answers.clone(), count(score.n_questions), right, share(*chance)]);
        }
        page.blank();
        page.table(table);
    }
}

fn share(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}
