"""Of tests with many cases of one law, those that `make test` runs; `make test-all` runs every case.

By file and test: the ids of the cases to run, none where the whole test is left to `make test-all`.
"""

SELECTED: dict[str, tuple[str, ...]] = {
    "test_anytime.py::test_an_interrupt_ends_the_search_at_once": ("0.5", "3.0"),
    "test_anytime.py::test_small_contest_graphs_are_proven": ("example", "B"),
    "test_capture.py::test_replay_gives_the_bits_of_the_step": (
        "gpt-tiny-options0",
        "llama-tiny-scan-options3",
        "mixtral-tiny-options4",
        "wrn-tiny-options6",
    ),
    "test_equality.py::test_recompute_and_microbatches_change_no_result": (
        "gpt-tiny-scan-selective",
    ),
    "test_fixed.py::test_the_step_equals_the_unsharded_one": (
        "gpt-tiny-parallelism1-options1",
        "llama-tiny-parallelism10-options10",
        "llama-tiny-parallelism12-options12",
    ),
    "test_frontier.py::test_as_fast_as_a_search_of_the_same_hosts": ("4",),
    "test_local_prices.py::test_tables_and_programs_cost_the_same": (
        "gpt-tiny-2x2x2-4-free",
        "mixtral-tiny-2x2x2-4-squeezed",
    ),
    "test_localize.py::test_programs_of_plans_keep_every_law": (
        "gpt-tiny-scan-mesh1-4-fused",
        "mixtral-tiny-mesh3-1-fused",
        "wrn-tiny-mesh4-1-plain",
    ),
    "test_memory.py::test_a_folded_graph_has_the_peak_of_the_whole_one": (
        "cpu-gpt-tiny-none-4",
        "cpu-gpt-tiny-elementwise-1",
        "cpu-llama-tiny-full-4",
        "cpu-mixtral-tiny-selective-1",
        "tpu-gpt-tiny-selective-4",
        "tpu-llama-tiny-none-1",
        "tpu-mixtral-tiny-full-4",
        "cuda-gpt-tiny-full-1",
        "cuda-llama-tiny-none-4",
        "cuda-llama-tiny-selective-4",
        "cuda-mixtral-tiny-elementwise-4",
    ),
    "test_mixtures.py::test_experts_beside_data_parallelism_equal_one_device": ("dp4 ep2",),
    "test_localize.py::test_a_pipeline_has_a_program_for_each_pass": ("schedule1",),
    "test_models.py::test_parameters_are_as_many_as_published": (
        "gpt2",
        "gpt2-xl",
        "gpt3-1.3b",
        "gpt3-175b",
        "llama3-8b",
        "mixtral-8x7b",
        "deepseek-v2",
        "deepseek-v3",
        "vit-b16",
        "wrn-50-2",
    ),
    "test_models.py::test_scanned_and_unrolled_layers_train_alike": ("gpt-tiny",),
    "test_overlap.py::test_the_simulator_and_the_windows_agree_on_fsdp": (
        "450GB/s-0.01-4",
        "60GB/s-0.03-1",
        "20GB/s-0.02-4",
    ),
    "test_pipeline_bounds.py::test_no_cut_of_any_layouts_is_faster_than_the_bounds": (
        "9-2",
        "16-2",
    ),
    "test_pipeline_bounds.py::test_no_cut_that_fits_is_faster_than_the_bound_by_cases": (
        "18-4-all",
    ),
    "test_pipeline_buffers.py::test_arrays_of_forward_passes_alive_at_once_are_those_in_flight": (
        "zero bubble",
    ),
    "test_pipeline_matrix.py::test_a_few_equal_one_device": (
        "gpt-tiny-zb-h1-fsdp",
        "mixtral-tiny-1f1b-dp",
    ),
    "test_pipeline_xla.py::test_a_rank_holds_as_many_microbatches_as_its_schedule_says": (
        "searched",
    ),
    "test_pipeline_xla.py::test_every_schedule_makes_the_same_gradients": (
        "zero bubble",
        "shuffled",
    ),
    "test_pipelines.py::test_a_refusal_for_want_of_memory_says_what_is_needed_and_what_may_fit": (),
    "test_pipelines.py::test_a_search_for_a_better_order_that_finds_no_room_ends_no_search_that_has_a_plan": (
        "1",
    ),
    "test_pipelines.py::test_all_units_together_cost_what_the_step_costs": (
        "gpt3-1.3b-elementwise",
        "gpt3-1.3b-full",
    ),
    "test_pipelines.py::test_any_number_of_stages_per_rank_runs": ("2-3-6",),
    "test_pipelines.py::test_memory_that_a_refusal_names_is_enough": ("pin0",),
    "test_pipelines.py::test_no_number_of_stages_per_rank_is_faster_than_the_one_that_is_chosen": (
        "4-3",
    ),
    "test_planner.py::test_finer_meshes_are_never_worse": (),
    "test_planner.py::test_the_search_matches_solving_every_combination": ("None", "450000.0"),
    "test_planner.py::test_over_hosts_states_are_replicated_until_memory_says_otherwise": (),
    "test_ring.py::test_a_ring_costs_the_same_as_a_plan_and_as_a_job": (
        "parameters,gradients,tensor",
    ),
    "test_truth.py::test_a_layout_costs_the_same_as_a_plan_and_as_a_job": (
        "llama3-8b-h100x8-1-65536-layout1-full-1",
        "gpt3-1.3b-a100x8-16-2048-layout3-none-2",
        "gpt3-1.3b-a100x8-16-2048-layout4-full-1",
        "mixtral-8x7b-4xh100x8@ib400-64-4096-layout7-full-1",
    ),
    "test_unstack.py::test_models_of_the_zoo_train_alike": (
        "gpt-tiny-scan-adamw-True",
        "llama-tiny-scan-sgd-False",
    ),
}
