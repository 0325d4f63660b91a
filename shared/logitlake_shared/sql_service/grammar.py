"""What a question may be made of: the nodes of DuckDB's parse tree, types and functions that the gate knows.

Everything here is an allow-list. A node that is not listed, or a listed one with a field that is not, is refused: a
release of DuckDB that gives a node a new field, or the parser a new one, makes the gate refuse and not look away. The
lists were made for DuckDB 2.0.0 from `json_serialize_sql` and `duckdb_functions()`, less what reads or writes files,
settings, catalogs, the environment, logs, sequences or secrets, waits, or runs SQL given as text.
"""

__all__ = [
    "ANONYMOUS",
    "ENGINE_VERSION",
    "FUNCTIONS",
    "NODES",
    "RELATIONS",
    "SPECIAL_NAMES",
    "TABLE_FUNCTIONS",
    "TYPES",
]

ENGINE_VERSION = "2.0.0"
"""The release of DuckDB whose tree this is."""

RELATIONS = ("samples", "tokens", "topk", "pairs", "images", "sample_index", "shards", "caches", "errors")
"""What a lake publishes; nothing else can be named, but what the question itself defines."""

_PLACE = "alias query_location query_location_length"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


def _node(fields: str) -> frozenset[str]:
    return _words(f"type {fields}")


def _expression(fields: str) -> frozenset[str]:
    return _words(f"class type {_PLACE} {fields}")


def _table(fields: str) -> frozenset[str]:
    return _words(f"type {_PLACE} sample {fields}")


NODES: dict[str, frozenset[str]] = {
    # query nodes
    "SELECT_NODE": _node(
        "aggregate_handling cte_map from_table group_expressions group_sets having modifiers qualify sample "
        "select_list where_clause"
    ),
    "SET_OPERATION_NODE": _node("children cte_map left modifiers right setop_all setop_type"),
    "RECURSIVE_CTE_NODE": _node("aliases cte_map cte_name key_targets left modifiers right union_all"),
    # what stands in FROM
    "BASE_TABLE": _table("at_clause catalog_name column_name_alias qualified_name schema_name table_name"),
    "EMPTY": _table(""),
    "EXPRESSION_LIST": _table("expected_names expected_types values"),
    "JOIN": _table(
        "condition delim_flipped duplicate_eliminated_columns is_implicit join_type left nearest_approx nearest_count "
        "nearest_order_type ranking_expression ref_type right using_columns"
    ),
    "PIVOT": _table("aggregates column_name_alias groups include_nulls pivots source unpivot_names"),
    "SHOW_REF": _table("catalog_name qualified_name query schema_name show_type table_name"),
    "TABLE SUBQUERY": _table("column_name_alias subquery"),
    "TABLE_FUNCTION": _table("column_name_alias function with_ordinality"),
    # modifiers
    "DISTINCT_MODIFIER": _node("distinct_on_targets"),
    "LIMIT_MODIFIER": _node("limit limit_type offset"),
    "ORDER_MODIFIER": _node("orders"),
    "ORDER_DEFAULT": _node("expression null_order"),
    "ASCENDING": _node("expression null_order"),
    "DESCENDING": _node("expression null_order"),
    # expressions, by class
    "BETWEEN": _expression("input lower upper"),
    "CASE": _expression("case_checks else_expr"),
    "CAST": _expression("child try_cast type_expr"),
    "COLLATE": _expression("child collation"),
    "COLUMN_REF": _expression("column_names"),
    "COMPARISON": _expression("left right"),
    "CONJUNCTION": _expression("children"),
    "CONSTANT": _expression("literal"),
    "DEFAULT": _expression(""),
    "FUNCTION": _expression(
        "arguments catalog distinct export_state filter function_name is_operator order_bys qualified_name schema"
    ),
    "LAMBDA": _expression("expr lhs syntax_type"),
    "OPERATOR": _expression("children"),
    "PARAMETER": _expression("identifier"),
    "POSITIONAL_REFERENCE": _expression("index"),
    "STAR": _expression("columns exclude_list expr qualified_exclude_list relation_name rename_list replace_list"),
    "SUBQUERY": _expression("child comparison_type subquery subquery_type"),
    "TYPE": _expression("catalog children qualified_name schema type_name"),
    "WINDOW": _expression(
        "arg_orders arguments catalog default_expr distinct end end_expr exclude_clause filter_expr function_name "
        "has_ignore_nulls ignore_nulls offset_expr orders partitions qualified_name schema start start_expr"
    ),
}
"""The fields that each kind of node has; an expression is known by its class."""

ANONYMOUS = frozenset(
    frozenset(fields.split())
    for fields in (
        "node named_param_map",
        "kind text",
        "map",
        "path",
        "key value",
        "aliases key_targets materialized payload_aggregates query_node",
        "expression name",
        "entries pivot_enum pivot_expressions unpivot_names",
        "alias star_expr values",
        "is_percentage method repeatable sample_rate sample_size seed",
        "is_null type value",
        "id type_info",
        "catalog column schema table",
        "then_expr when_expr",
    )
)
"""The fields of the objects that are parts of nodes."""

TYPES = _words(
    "array bigint binary bit bitstring blob bool boolean bpchar bytea char date datetime dec decimal double enum float "
    "float4 float8 guid hugeint int int1 int128 int16 int2 int32 int4 int64 int8 integer integral interval json list "
    "logical long map numeric nvarchar oid real row short signed smallint string struct text time timestamp "
    "timestamp_ms timestamp_ns timestamp_s timestamp_us timestamptz timetz tinyint ubigint uhugeint uint128 uint16 "
    "uint32 uint64 uint8 uinteger union usmallint utinyint uuid varbinary varchar"
) | {"time with time zone", "timestamp with time zone"}
"""Types that a value can be cast to."""

SPECIAL_NAMES = _words(
    "current_catalog current_database current_query current_role current_schema current_schemas current_setting "
    "current_user session_user user"
)
"""Names of columns that DuckDB takes for a function when there is no such column."""

TABLE_FUNCTIONS = frozenset({"range", "generate_series", "unnest", "json_each", "json_tree"})
"""Functions that may stand in FROM."""

_OPERATORS = (
    "!= !~~ !~~* % & && * ** + - ->> / // < <-> << <= <=> <@ = > >= >> @ @> ^ ^@ | || ~ ~~ ~~* ~~~ !__postfix xor"
)
_AGGREGATES = (
    "any_value approx_count_distinct approx_quantile approx_top_k arbitrary arg_max arg_max_null arg_max_nulls_last "
    "arg_min arg_min_null arg_min_nulls_last argmax argmin array_agg avg bit_and bit_or bit_xor bitstring_agg bool_and "
    "bool_or corr count count_if count_star countif covar_pop covar_samp entropy favg first fsum geomean "
    "geometric_mean group_concat histogram histogram_exact is_histogram_other_bin kahan_sum kurtosis kurtosis_pop last "
    "list listagg lttb mad max max_by mean median min min_by mode product quantile "
    "quantile_cont quantile_disc regr_avgx regr_avgy regr_count regr_intercept regr_r2 regr_slope regr_sxx regr_sxy "
    "regr_syy reservoir_quantile sem skewness stddev stddev_pop stddev_samp string_agg sum sum_no_overflow sumkahan "
    "var_pop var_samp variance wavg weighted_avg json_group_array json_group_object json_group_structure"
)
_WINDOWS = (
    "cume_dist dense_rank fill first_value lag last_value lead nth_value ntile percent_rank rank rank_dense row_number"
)
_NUMBERS = (
    "abs acos acosh add asin asinh atan atan2 atanh bin binom bit_count cbrt ceil ceiling cos cosh cot degrees divide "
    "equi_width_bins even exp factorial fdiv floor fmod gamma gcd greatest greatest_common_divisor isfinite isinf "
    "isnan lcm least least_common_multiple lgamma ln log log10 log2 mod multiply nextafter pi pow power radians random "
    "round round_even roundbankers sign signbit sin sinh sqrt subtract tan tanh trunc"
)
_TEXTS = (
    "array_to_string array_to_string_comma_default ascii bar base64 bit_length bit_position bitstring char_length "
    "character_length chr concat concat_ws contains damerau_levenshtein decode editdist3 encode ends_with format "
    "format_bytes formatreadabledecimalsize formatreadablesize from_base64 from_binary from_hex get_bit hamming hash "
    "hex ilike_escape instr jaccard jaro_similarity jaro_winkler_similarity lcase left left_grapheme len length "
    "length_grapheme levenshtein like_escape lower lpad ltrim md5 md5_number md5_number_lower md5_number_upper "
    "mismatches nfc_normalize not_ilike_escape not_like_escape octet_length ord overlay parse_formatted_bytes position "
    "prefix printf regexp_escape regexp_extract regexp_extract_all regexp_full_match regexp_matches regexp_replace "
    "regexp_split_to_array repeat replace reverse right right_grapheme rpad rtrim set_bit sha1 sha256 split split_part "
    "starts_with str_split str_split_regex string_split string_split_regex string_to_array strip_accents strlen strpos "
    "substr substring substring_grapheme suffix to_base to_base64 to_binary to_hex translate trim ucase unbin unhex "
    "unicode upper url_decode url_encode"
)
_TIMES = (
    "age ago century current_date current_localtime current_localtimestamp date_add date_diff date_part date_sub "
    "date_trunc datediff datepart datesub datetrunc day dayname dayofmonth dayofweek dayofyear days_in_month decade "
    "epoch epoch_ms epoch_ns epoch_us era get_current_time get_current_timestamp hour isodow isoyear julian last_day "
    "make_date make_time make_timestamp make_timestamp_ms make_timestamp_ns make_timestamptz microsecond millennium "
    "millisecond minute month monthname nanosecond normalized_interval now quarter second strftime strptime "
    "time_bucket timezone timezone_hour timezone_minute to_centuries to_days to_decades to_hours to_microseconds "
    "to_millennia to_milliseconds to_minutes to_months to_quarters to_seconds to_timestamp to_weeks to_years today "
    "transaction_timestamp try_strptime week weekday weekofyear year yearweek uuid uuidv4 uuidv7 gen_random_uuid "
    "uuid_extract_timestamp uuid_extract_version"
)
_NESTED = (
    "aggregate apply array_aggr array_aggregate array_append array_apply array_cat array_concat array_contains "
    "array_cosine_distance array_cosine_similarity array_cross_product array_distance array_distinct array_dot_product "
    "array_extract array_filter array_grade_up array_has array_has_all array_has_any array_indexof array_inner_product "
    "array_intersect array_length array_negative_dot_product array_negative_inner_product array_pop_back "
    "array_pop_front array_position array_prepend array_push_back array_push_front array_reduce array_resize "
    "array_reverse array_reverse_sort array_select array_slice array_sort array_transform array_unique array_value "
    "array_where array_zip cardinality element_at enum_code enum_first enum_last enum_range enum_range_boundary filter "
    "flatten generate_series generate_subscripts grade_up list_aggr list_aggregate list_any_value list_append "
    "list_apply list_approx_count_distinct list_avg list_bit_and list_bit_or list_bit_xor list_bool_and list_bool_or "
    "list_cat list_concat list_contains list_cosine_distance list_cosine_similarity list_count list_distance "
    "list_distinct list_dot_product list_element list_entropy list_extract list_filter list_first list_grade_up "
    "list_has list_has_all list_has_any list_histogram list_indexof list_inner_product list_intersect list_kurtosis "
    "list_kurtosis_pop list_last list_mad list_max list_median list_min list_mode list_negative_dot_product "
    "list_negative_inner_product list_pack list_position list_prepend list_product list_reduce list_resize "
    "list_reverse list_reverse_sort list_select list_sem list_skewness list_slice list_sort list_stddev_pop "
    "list_stddev_samp list_string_agg list_sum list_transform list_unique list_value list_var_pop list_var_samp "
    "list_where list_zip map map_concat map_contains map_contains_entry map_contains_value map_entries map_extract "
    "map_extract_value map_from_entries map_keys map_values range reduce row struct_concat struct_contains "
    "struct_extract struct_extract_at struct_has struct_indexof struct_insert struct_keys struct_pack struct_position "
    "struct_update struct_values union_extract union_tag union_value unnest unpivot_list"
)
_JSON = (
    "array_to_json from_json from_json_strict json json_array json_array_length json_contains json_deep_merge "
    "json_exists json_extract json_extract_path json_extract_path_text json_extract_string json_insert json_keys "
    "json_merge_patch json_merge_patch_diff json_normalize json_object json_pretty json_quote json_remove json_replace "
    "json_set json_strip_nulls json_structure json_transform json_transform_strict json_type json_valid json_value "
    "row_to_json to_json"
)
_OTHERS = "alias assert_true constant_or_null if nullif typeof pg_typeof"
FUNCTIONS = _words(" ".join((_OPERATORS, _AGGREGATES, _WINDOWS, _NUMBERS, _TEXTS, _TIMES, _NESTED, _JSON, _OTHERS)))
"""Scalar functions, aggregates, window functions and macros that may be called, in small letters."""
