"""Of tests with many cases of one law, those that `make test` runs; `make test-all` runs every case.

By file and test: the ids of the cases to run, none where the whole test is left to `make test-all`.
"""

SELECTED: dict[str, tuple[str, ...]] = {
    "test_agreement.py::test_a_process_alone_ends_at_the_deadline": ("0",),
    "test_all_kinds.py::test_a_few_equal_the_unsharded_step": ("81",),
    "test_anytime.py::test_an_interrupt_ends_the_search_at_once": ("0.5", "3.0"),
    "test_anytime.py::test_small_contest_graphs_are_proven": ("example", "B"),
    "test_audit.py::test_predicted_bytes_and_memory_are_near_the_compiled_ones": (
        "gpt-tiny",
        "dlrm-tiny",
    ),
    "test_batch_stats.py::test_each_microbatch_is_normed_by_itself": ("two passes", "masked"),
    "test_capture.py::test_replay_gives_the_bits_of_the_step": (
        "gpt-tiny-options0",
        "llama-tiny-scan-options3",
        "mixtral-tiny-options4",
        "wrn-tiny-options6",
    ),
    "test_composites.py::test_fused_steps_equal_plain_jax_on_eight_devices": (
        "grouped, causal-2x4",
        "crossed-8",
        "bias, dropout-2x4",
        "layers in a loop-8",
        "padded, in a loop-2x4",
        "windows, in loops-8",
        "computed again-2x4",
    ),
    "test_equality.py::test_recompute_and_microbatches_change_no_result": (
        "gpt-tiny-scan-selective",
    ),
    "test_fixed.py::test_the_step_equals_the_unsharded_one": (
        "llama-tiny-parallelism10-options10",
        "llama-tiny-parallelism12-options12",
    ),
    "test_frontier.py::test_a_plan_made_anew_equals_the_unsharded_step": (),
    "test_frontier.py::test_as_fast_as_a_search_of_the_same_hosts": (),
    "test_indexing.py::test_ids_find_their_places_however_an_op_is_cut": (
        "gather-fill",
        "scatter-add-fill",
    ),
    "test_islands.py::test_every_combination_looked_at_is_no_better": (),
    "test_islands.py::test_requests_that_unlike_devices_cannot_meet": (),
    "test_key_spans.py::test_leaving_keys_out_changes_nothing": (
        "causal",
        "documents of 32",
        "dropout",
    ),
    "test_local_prices.py::test_tables_and_programs_cost_the_same": (
        "mixtral-tiny-2x2x2-4-squeezed",
    ),
    "test_localize.py::test_a_pipeline_has_a_program_for_each_pass": ("schedule1",),
    "test_localize.py::test_programs_of_plans_keep_every_law": (
        "mixtral-tiny-mesh3-1-fused",
        "wrn-tiny-mesh4-1-plain",
    ),
    "test_losses.py::test_fused_steps_equal_plain_jax_on_eight_devices": (
        "optax, integers-8-v",
        "optax, integers-2x2x2-vvb",
        "log_softmax, take_along_axis-4x2-vt",
        "one-hot-2x2x2-btv",
        "tied, bias-4x2-bv",
        "tied, bias-8-b",
    ),
    "test_memory.py::test_a_folded_graph_has_the_peak_of_the_whole_one": (
        "cpu-gpt-tiny-elementwise-1",
        "cpu-mixtral-tiny-selective-1",
        "tpu-llama-tiny-none-1",
        "cuda-gpt-tiny-full-1",
        "cuda-llama-tiny-selective-4",
    ),
    "test_mixtures.py::test_experts_beside_data_parallelism_equal_one_device": ("dp4 ep2",),
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
    "test_models.py::test_tiny_models_learn": ("llama-tiny", "dlrm-tiny", "wrn-tiny"),
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
    "test_pipeline_xla.py::test_every_schedule_makes_the_same_gradients": ("zero bubble",),
    "test_pipelined_overlap.py::test_no_cut_of_any_layouts_is_faster_than_the_bounds": (
        "all-mesh1-2-2",
        "parameters,gradients-mesh2-1-2",
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
    "test_pipelines.py::test_memory_that_a_refusal_names_is_enough": (),
    "test_pipelines.py::test_no_number_of_stages_per_rank_is_faster_than_the_one_that_is_chosen": (
        "4-3",
    ),
    "test_planner.py::test_finer_meshes_are_never_worse": (),
    "test_planner.py::test_over_hosts_states_are_replicated_until_memory_says_otherwise": (),
    "test_planner.py::test_the_search_matches_solving_every_combination": ("None", "450000.0"),
    "test_price.py::test_all_stages_together_hold_the_models_own_state": (
        "tp1-pp2-dp2-cp1-zero3-gpt",
        "tp1-pp2-dp2-cp1-zero3-llama",
        "tp1-pp2-dp2-cp1-zero3-mixtral",
        "tp2-pp2-dp2-cp1-zero1-gpt",
        "tp2-pp2-dp2-cp1-zero1-llama",
        "tp2-pp2-dp2-cp1-zero1-mixtral",
        "tp1-pp1-dp1-cp2-zero1-gpt",
        "tp1-pp1-dp1-cp2-zero1-llama",
        "tp1-pp1-dp1-cp2-zero1-mixtral",
    ),
    "test_random_programs.py::test_pipelines_equal_plain_jax": ("0",),
    "test_random_programs.py::test_steps_equal_plain_jax": ("1", "2", "3", "5"),
    "test_ring.py::test_a_ring_costs_the_same_as_a_plan_and_as_a_job": (
        "parameters,gradients,tensor",
    ),
    "test_ring.py::test_a_ring_equals_one_device": ("causal-2x4-ring", "documents-8-ring"),
    "test_saved.py::test_it_costs_what_one_program_costs": (
        "gpt-tiny",
        "llama-tiny",
        "mixtral-tiny",
    ),
    "test_single.py::test_an_audit_finds_what_was_planned_between_stages_and_sees_one_permute_too_few": (
        "4-mesh1",
    ),
    "test_single.py::test_recomputing_changes_no_gradient": (),
    "test_torch_capture.py::test_a_graph_takes_the_step_that_torch_takes": (
        "perceptron-adam",
        "gpt-adamw",
        "llama-adamw",
        "mixture-sgd",
        "convnet-sgd",
    ),
    "test_torch_capture.py::test_repeated_layers_fold": ("Llama",),
    "test_torch_local.py::test_a_step_of_jax_gives_the_same_on_torch": (
        "deepseek-tiny",
        "gpt-tiny-scan",
        "wrn-tiny",
    ),
    "test_torch_local.py::test_planned_steps_give_what_one_device_gives": (
        "gpt-tiny-2x2x2-True",
        "llama-tiny-microbatches-False",
        "mixtral-tiny-squeezed-True",
    ),
    "test_torch_local.py::test_rows_of_attention_cut_over_ranks_equal_one_device": (
        "fused-causal-2x4-even",
        "fused-masked out-4-ring",
        "ring-documents-8-ring",
    ),
    "test_torch_pipelines.py::test_other_models_and_meshes_give_what_one_device_gives": (
        "four stages",
        "mixtral",
    ),
    "test_torch_pipelines.py::test_stages_of_unlike_meshes_give_what_one_device_gives": (
        "meshes1",
    ),
    "test_torch_pipelines.py::test_two_stages_of_two_ranks_give_what_one_device_gives": (
        "1f1b",
        "gpipe",
        "interleaved",
        "zb-h1",
    ),
    "test_truth.py::test_a_layout_costs_the_same_as_a_plan_and_as_a_job": (
        "gpt3-1.3b-a100x8-16-2048-layout4-full-1",
        "mixtral-8x7b-4xh100x8@ib400-64-4096-layout7-full-1",
    ),
    "test_unstack.py::test_models_of_the_zoo_train_alike": (
        "gpt-tiny-scan-adamw-True",
        "llama-tiny-scan-sgd-False",
    ),
    "test_view.py::test_notebooks_run_from_top_to_bottom": (),
}
