//! The guide: how to use the command line, page by page, and what it guarantees. No code, only documentation.
//!
//! Take the tour in README.md first. Then, by what you want to do:
//!
//! | you want to | page |
//! | --- | --- |
//! | add adapters to a checkpoint, combine them, check the result | [merging] |
//! | use a LoRA adapter, or a sparse adapter of PEFT, SpIEL or the published NeuroAda code | [adapters of other tools][other_tools] |
//! | take an adapter out again, or recover from a crash | [undo and recovery][undo] |
//! | choose connections of very large checkpoints, or on a cluster | [masks at scale][masks] |
//! | work on FP8, FP4, INT4 and other quantized checkpoints, or decode them | [quantized checkpoints][quantized] |
//! | train deltas with this program | [training] |
//! | train deltas in PyTorch | [training elsewhere][training_elsewhere] |
//! | measure a model | [evaluation] |
//! | publish an adapter, or update inference servers | [distribution] |
//! | work on a GPU | [GPU][gpu] |
//! | read the files with other programs | [file formats][formats] |
//! | understand an error | [troubleshooting] |
//! | look up a command, an exit code or a global option | [commands] |
//! | read reports in a script | [JSON reports][json] |
//! | make a release of this project | [releasing] |

/// Declares one module per page. The pages link to each other by file name, which works where Markdown files are shown; the definitions
/// before a page come first, so that in the documentation the same links lead to the modules.
macro_rules! pages {
    ($($name:ident = $file:literal,)*) => {$(
        #[doc = "[merging]: crate::guide::merging"]
        #[doc = "[other_tools]: crate::guide::other_tools"]
        #[doc = "[undo]: crate::guide::undo"]
        #[doc = "[masks]: crate::guide::masks"]
        #[doc = "[quantized]: crate::guide::quantized"]
        #[doc = "[training]: crate::guide::training"]
        #[doc = "[training_elsewhere]: crate::guide::training_elsewhere"]
        #[doc = "[evaluation]: crate::guide::evaluation"]
        #[doc = "[distribution]: crate::guide::distribution"]
        #[doc = "[gpu]: crate::guide::gpu"]
        #[doc = "[formats]: crate::guide::formats"]
        #[doc = "[troubleshooting]: crate::guide::troubleshooting"]
        #[doc = "[commands]: crate::guide::commands"]
        #[doc = "[json]: crate::guide::json"]
        #[doc = "[releasing]: crate::guide::releasing"]
        #[doc = ""]
        #[doc = include_str!($file)]
        pub mod $name {}
    )*};
}

pages! {
    merging = "merging.md",
    other_tools = "other_tools.md",
    undo = "undo.md",
    masks = "masks.md",
    quantized = "quantized.md",
    training = "training.md",
    training_elsewhere = "training_elsewhere.md",
    evaluation = "evaluation.md",
    distribution = "distribution.md",
    gpu = "gpu.md",
    formats = "formats.md",
    troubleshooting = "troubleshooting.md",
    commands = "commands.md",
    json = "../cli/json.md",
    releasing = "releasing.md",
}
